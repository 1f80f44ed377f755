//! What one client can take from the others, and what ends with a key, a client or the server.
#![allow(clippy::unwrap_used)]

mod agents;
mod served;

use agent_proto::messages::{Empty, FileInfo, from_agent::Kind};
use army::server::{BufferLimits, Doors, SessionLimits};
use army_api::client::{Client, ClientError};
use army_api::exec::ExecResult;
use army_api::keys::{Key, Role};
use army_api::{Problem, ProblemKind};
use futures_util::{SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::{Role as SocketRole, frame::coding::CloseCode};

use agents::{Agent, LIMIT, with_agents};
use served::{Server, create_key};

type Answer = Result<ExecResult, ClientError>;

fn exec(client: &Client, vm: &str) -> JoinHandle<Answer> {
    let (client, path) = (client.clone(), format!("/v1/vms/{vm}/exec"));
    let body = json!({"command": ["sleep", "3600"], "timeout_ms": 3_600_000});
    tokio::spawn(async move { client.send(Method::POST, &path, &body).await })
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("it goes on")
}

fn refused(answer: Answer) -> Problem {
    match answer.unwrap_err() {
        ClientError::Refused(problem) => problem,
        other => panic!("{other}"),
    }
}

type Socket = WebSocketStream<reqwest::Upgraded>;

async fn web_socket(client: &Client, path: &str) -> Socket {
    let key = "AAAAAAAAAAAAAAAAAAAAAA==";
    let query = match path.ends_with("terminal") {
        true => json!({"rows": 24, "columns": 80}),
        false => json!({}),
    };
    let answer = client.web_socket(path, &query, key).await.unwrap();
    let stream = answer.upgrade().await.unwrap();
    WebSocketStream::from_raw_socket(stream, SocketRole::Client, None).await
}

/// The code that a WebSocket is closed with.
async fn close_code(socket: &mut Socket) -> CloseCode {
    loop {
        if let Message::Close(frame) = within(socket.next()).await.unwrap().unwrap() {
            return frame.unwrap().code;
        }
    }
}

async fn silent_connections(url: &str) -> Vec<TcpStream> {
    let address = url.split("://").nth(1).unwrap();
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    silent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_silent_connections_do_not_close_the_door() {
    let server = served::server(None).await;
    let key = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let files = army::server::tls::Files {
        certificate: server.dir.path().join("cert.pem"),
        key: server.dir.path().join("key.pem"),
    };
    std::fs::write(&files.certificate, key.cert.pem()).unwrap();
    std::fs::write(&files.key, key.signing_key.serialize_pem()).unwrap();
    let tls = army::server::tls::config(files).unwrap();
    let encrypted = server.over_tls(tls).await;
    let _silent = [
        silent_connections(&server.url).await,
        silent_connections(&encrypted).await,
    ];
    let plain = server.admin.get::<Value>("/v1/vms", &());
    within(plain).await.unwrap();
    let pem = key.cert.pem();
    let client = Client::believing(&encrypted, server.admin.key(), pem.as_bytes()).unwrap();
    let page = client.get::<Value>("/v1/vms", &());
    within(page).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_beyond_a_limit_are_refused_with_its_name_and_free_again_with_their_end() {
    let limits = SessionLimits {
        per_vm: 2,
        per_key: 3,
        per_tenant: 4,
        total: 5,
    };
    let change = |doors| Doors {
        sessions: limits,
        ..doors
    };
    let (server, mut agents) = with_agents(4, 7, change).await;
    let admin = &server.admin;
    let refusal = async |client: &Client, vm: &str| {
        let problem = refused(within(exec(client, vm)).await.unwrap());
        assert_eq!((problem.kind, problem.status), (ProblemKind::Busy, 429));
        assert!(problem.retry_after_s.is_some(), "{problem}");
        let limit = problem.limit.unwrap();
        assert!(problem.detail.contains(&limit.value.to_string()));
        (limit.name, limit.value)
    };
    let mut running = Vec::new();
    for (agent, vm) in agents[..3].iter_mut().zip(["vm-1", "vm-1", "vm-2"]) {
        running.push(exec(admin, vm));
        agent.start().await;
    }
    // The VM has two, the key three, the tenant four, and the server five.
    let same_tenant = server.client("root", Role::User).await;
    let limit = refusal(&same_tenant, "vm-1").await;
    assert_eq!(limit, ("sessions_per_vm".to_owned(), 2));
    let limit = refusal(admin, "vm-3").await;
    assert_eq!(limit, ("sessions_per_key".to_owned(), 3));
    running.push(exec(&same_tenant, "vm-3"));
    agents[3].start().await;
    let limit = refusal(&same_tenant, "vm-3").await;
    assert_eq!(limit, ("sessions_per_tenant".to_owned(), 4));
    let other = server.client("other", Role::Admin).await;
    running.push(exec(&other, "root%2Fvm-3"));
    agents[4].start().await;
    let limit = refusal(&other, "root%2Fvm-4").await;
    assert_eq!(limit, ("sessions".to_owned(), 5));
    let metrics = other.bytes("/metrics", &()).await.unwrap();
    let text: Vec<Vec<u8>> = metrics.map(Result::unwrap).collect().await;
    let text = String::from_utf8(text.concat()).unwrap();
    assert!(
        text.contains("army_limit_used{limit=\"sessions\"} 5"),
        "{text}"
    );
    assert!(text.contains("army_limit{limit=\"sessions_per_vm\"} 2"));
    // The end of a client frees its place.
    running[0].abort();
    agents[0].end().await;
    let next = exec(admin, "vm-1");
    agents[5].start().await;
    agents[5].exit().await;
    within(next).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_key_ends_everything_that_is_open_with_it() {
    let (server, mut agents) = with_agents(1, 6, |doors| doors).await;
    let key = create_key(&server.records, "root", Role::User, None).await;
    let user = Client::new(&server.url, &key.secret).unwrap();
    let (mut rest, kept) = {
        let mut agents = agents.drain(..);
        let kept = agents.next().unwrap();
        (agents.collect::<Vec<Agent>>(), kept)
    };
    let mut kept = kept;
    let of_another = exec(&server.admin, "vm-1");
    kept.start().await;

    let command = exec(&user, "vm-1");
    rest[0].start().await;
    let (mut terminal, ()) =
        tokio::join!(web_socket(&user, "/v1/vms/vm-1/terminal"), rest[1].start());
    let connect = async {
        rest[2].receive().await.unwrap();
        rest[2].send(Kind::Connected(Empty {})).await;
    };
    let (mut port, ()) = tokio::join!(web_socket(&user, "/v1/vms/vm-1/ports/80"), connect);
    let path = "/v1/vms/vm-1/commands/1/output";
    let query = json!({});
    let (output, ()) = tokio::join!(user.stream::<Value, _>(path, &query), rest[3].start());
    let read = async {
        rest[4].receive().await.unwrap();
        rest[4].send(Kind::File(FileInfo::default())).await;
        rest[4].send(Kind::Data(b"part".to_vec())).await;
    };
    let query = json!({"path": "/x"});
    let (file, ()) = tokio::join!(user.bytes("/v1/vms/vm-1/files", &query), read);

    let path = format!("/v1/keys/{}", key.key.id);
    server.admin.plain(Method::DELETE, &path).await.unwrap();
    let problem = refused(within(command).await.unwrap());
    assert_eq!(problem.kind, ProblemKind::Unauthorized);
    assert_eq!(close_code(&mut terminal).await, CloseCode::Policy);
    assert_eq!(close_code(&mut port).await, CloseCode::Policy);
    let events: Vec<_> = within(output.unwrap().collect()).await;
    assert!(events.iter().all(Result::is_ok), "{events:?}");
    // A part of a file does not look like the whole file.
    let pieces: Vec<_> = within(file.unwrap().collect()).await;
    assert!(pieces.last().unwrap().is_err(), "{pieces:?}");
    for agent in &mut rest {
        agent.end().await;
    }
    // Another key's command goes on.
    kept.exit().await;
    within(of_another).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_says_so_to_terminals_and_finishes_commands_that_end() {
    let (server, mut agents) = with_agents(1, 3, |doors| doors).await;
    let (mut terminal, ()) = tokio::join!(
        web_socket(&server.admin, "/v1/vms/vm-1/terminal"),
        agents[0].start()
    );
    let events = server.admin.events(None).await.unwrap();
    let ends = exec(&server.admin, "vm-1");
    agents[1].start().await;
    let endless = exec(&server.admin, "vm-1");
    agents[2].start().await;
    server.stop.begin();
    assert_eq!(close_code(&mut terminal).await, CloseCode::Away);
    agents[0].end().await;
    within(events.count()).await;
    agents[1].exit().await;
    within(ends).await.unwrap().unwrap();
    within(server.serving).await.unwrap();
    endless.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_beyond_the_tenants_budget_is_omitted_and_counted() {
    let change = |doors| Doors {
        buffers: BufferLimits {
            per_tenant: 1 << 20,
            total: 1 << 30,
        },
        ..doors
    };
    let (server, mut agents) = with_agents(1, 2, change).await;
    for agent in &mut agents {
        let command = exec(&server.admin, "vm-1");
        agent.start().await;
        for _ in 0..64 {
            agent.print(vec![b'x'; 32 << 10]).await;
        }
        agent.exit().await;
        let result = within(command).await.unwrap().unwrap();
        // What was taken for the first response is there for the second.
        assert_eq!(
            (result.stdout.len(), result.omitted_bytes),
            (1 << 20, 1 << 20)
        );
    }
}

/// The most memory that this process has had, in MiB.
fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|it| it.starts_with("VmHWM:")).unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib >> 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn six_commands_that_print_control_characters_take_the_memory_of_their_output() {
    const COMMANDS: usize = 6;
    const MIB: usize = 16;
    let (server, mut agents) = with_agents(1, COMMANDS, |doors| doors).await;
    let before = peak_memory();
    let commands: Vec<_> = (0..COMMANDS)
        .map(|_| {
            let request = reqwest::Client::new()
                .post(format!("{}/v1/vms/vm-1/exec", server.url))
                .bearer_auth(server.admin.key())
                .json(&json!({"command": ["x"]}));
            tokio::spawn(async move {
                let mut answer = request.send().await.unwrap();
                let mut len = 0;
                while let Some(piece) = answer.chunk().await.unwrap() {
                    len += piece.len();
                }
                len
            })
        })
        .collect();
    let print = |agent: Agent| async move {
        let mut agent = agent;
        agent.start().await;
        for _ in 0..MIB * 16 {
            agent.print(vec![1; 64 << 10]).await;
        }
        agent
    };
    // All of the output is there before the first response begins.
    let printed = futures_util::future::join_all(agents.drain(..).map(print)).await;
    for mut agent in printed {
        agent.exit().await;
    }
    for command in commands {
        let len = within(command).await.unwrap();
        assert!(len > (6 * MIB) << 20, "{len}");
    }
    let grown = peak_memory() - before;
    assert!(grown < 2 * COMMANDS * MIB, "{grown} MiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_is_cut_short_is_no_file() {
    let (server, mut agents) = with_agents(1, 2, |doors| doors).await;
    let address = server.url.split("://").nth(1).unwrap();
    let key = server.admin.key();
    for (agent, header, sent) in [
        (0, "content-length: 100", "half of it"),
        (1, "transfer-encoding: chunked", "5\r\nhello\r\n"),
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "PUT /v1/vms/vm-1/files?path=/x HTTP/1.1\r\nhost: x\r\n\
             authorization: Bearer {key}\r\n{header}\r\n\r\n{sent}"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let agent: &mut Agent = &mut agents[agent];
        // The request and the first bytes have arrived.
        agent.receive().await.unwrap();
        agent.receive().await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = within(stream.read_to_end(&mut answer)).await;
        assert!(!String::from_utf8_lossy(&answer).contains("204"));
        while let Some(message) = agent.receive().await {
            let end = agent_proto::messages::from_host::Kind::DataEnd(Empty {});
            assert_ne!(message, end, "the agent would keep a part of the file");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_of_a_port_is_pinged() {
    let (server, mut agents) = with_agents(1, 1, |doors| doors).await;
    let connect = async {
        agents[0].receive().await.unwrap();
        agents[0].send(Kind::Connected(Empty {})).await;
    };
    let (mut port, ()) = tokio::join!(web_socket(&server.admin, "/v1/vms/vm-1/ports/80"), connect);
    // The first one comes at once.
    let message = within(port.next()).await.unwrap().unwrap();
    assert!(matches!(message, Message::Ping(_)), "{message}");
    port.close(None).await.unwrap();
    agents[0].end().await;
}

async fn key_id(server: &Server) -> String {
    let keys: Vec<Key> = server.admin.get("/v1/keys", &()).await.unwrap();
    keys[0].id.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_name_who_has_acted_and_users_see_those_of_their_own() {
    let server = served::server(None).await;
    let user = server.client("red", Role::User).await;
    let events = user.events(Some(0)).await.unwrap();
    let all = server.admin.events(Some(0)).await.unwrap();
    let template = served::template("t");
    server.records.insert_template(&template).await.unwrap();
    let tag = json!({"template": "t"});
    let tagged: Value = server
        .admin
        .send(Method::PUT, "/v1/tags/latest", &tag)
        .await
        .unwrap();
    assert_eq!(tagged["name"], "t");
    let drain = "/v1/hosts/here/drain";
    let _: Value = server.admin.send(Method::POST, drain, &()).await.unwrap();
    let created = json!({"template": "t"});
    // It fails, and leaves a record.
    let created: Result<Value, _> = user.send(Method::POST, "/v1/vms", &created).await;
    created.unwrap_err();
    let vm = served::record("000000000009", "mine", "red");
    let none = Default::default();
    server.records.insert_vms(&[vm], &none).await.unwrap();

    let admin = key_id(&server).await;
    let all: Vec<_> = within(all.take(6).map(Result::unwrap).collect()).await;
    let acted = |kind: &str| {
        let event = all.iter().find(|event| event.kind == kind);
        event
            .unwrap_or_else(|| panic!("{kind} in {all:?}"))
            .actor
            .clone()
    };
    assert_eq!(acted("template.tagged"), admin);
    assert_eq!(acted("host.draining"), admin);
    assert_eq!(acted("template.registered"), "system");
    let seen: Vec<_> = within(events.take(3).map(Result::unwrap).collect()).await;
    let kinds: Vec<&str> = seen.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(
        kinds,
        ["template.registered", "template.tagged", "vm.creating"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_whose_client_says_goodbye_ends_its_program() {
    let (server, mut agents) = with_agents(1, 1, |doors| doors).await;
    let (mut terminal, ()) = tokio::join!(
        web_socket(&server.admin, "/v1/vms/vm-1/terminal"),
        agents[0].start()
    );
    terminal.send(Message::Close(None)).await.unwrap();
    agents[0].end().await;
}
