//! Guests whose agents greet and then say nothing: what they cost the server, and what ends when a
//! client leaves.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod served;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use agent_proto::frame;
use agent_proto::messages::{FromAgent, Hello, from_agent};
use army::server::{Doors, SessionLimits};
use army_api::client::Client;
use army_api::keys::Role;
use army_api::vms::{CreateVms, CreatedVms, Vm, VmPage, VmState};
use army_node_api::simulated::SimulatedNode;
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use reqwest::Method;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use served::{Server, record, server_with, template};

/// Commands at once: far more than the threads that the server may have.
const COMMANDS: usize = 10_000;
/// The open files of a command here, where both of its ends are.
const FILES_EACH: u64 = 4;
/// The open files of everything else.
const OWN_FILES: u64 = 500;
/// How many commands are being started at a time.
const STARTING: usize = 100;
/// The threads of this process, whose server has two workers and a database: far fewer than one for
/// each command.
const MOST_THREADS: usize = 60;
/// The most memory of a command, with both of its ends, in KiB.
const MOST_KIB: usize = 100;
/// The time limit for what should happen at once, on a machine under load.
const LIMIT: Duration = Duration::from_secs(60);

/// A server with a running VM, and the other ends of the connections to the VM's agent.
async fn with_silent_agents(count: usize) -> (Server, Vec<UnixStream>) {
    let node = Arc::new(SimulatedNode::new("here"));
    let mut agents = Vec::new();
    for _ in 0..count {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        node.add_agent(ours);
        theirs.write_all(&greeting()).await.unwrap();
        agents.push(theirs);
    }
    let many = SessionLimits {
        per_vm: COMMANDS,
        per_key: COMMANDS,
        per_tenant: COMMANDS,
        ..SessionLimits::default()
    };
    let server = server_with(node, |doors| Doors {
        sessions: many,
        ..doors
    })
    .await;
    let vms = [record("000000000001", "silent", "root")];
    let records = &server.records;
    records.insert_vms(&vms, &BTreeMap::new()).await.unwrap();
    let ids = [vms[0].id.clone()];
    records
        .set_vm_states(&ids, VmState::Running, "")
        .await
        .unwrap();
    records.insert_template(&template("t")).await.unwrap();
    (server, agents)
}

fn greeting() -> Vec<u8> {
    let hello = from_agent::Kind::Hello(Hello::default());
    let mut bytes = Vec::new();
    frame::encode(&FromAgent { kind: Some(hello) }, &mut bytes).unwrap();
    bytes
}

/// Requests a command that takes as long as an exec may, on a connection of its own.
async fn exec(server: &Server, secret: &str) -> TcpStream {
    let address = server.url.strip_prefix("http://").unwrap();
    let mut client = TcpStream::connect(address).await.unwrap();
    let body = json!({"command": ["sleep", "3600"], "timeout_ms": 3_600_000}).to_string();
    let request = format!(
        "POST /v1/vms/silent/exec HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {secret}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    client.write_all(request.as_bytes()).await.unwrap();
    client
}

/// Reads the request of a command.
async fn request(agent: &mut UnixStream) {
    let mut bytes = [0; 1024];
    let read = tokio::time::timeout(LIMIT, agent.read(&mut bytes));
    assert!(read.await.unwrap().unwrap() > 0);
}

/// Reads until the connection ends.
async fn end(agent: &mut UnixStream) {
    let mut rest = Vec::new();
    // A connection that was cut off ends with an error.
    let _ = tokio::time::timeout(LIMIT, agent.read_to_end(&mut rest))
        .await
        .unwrap();
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

/// The memory of this process, in KiB.
fn memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|it| it.strip_prefix("VmRSS:"));
    let number = line.unwrap().split_whitespace().next().unwrap();
    number.parse().unwrap()
}

/// As many of the commands as this process may have open files for: a host may permit fewer.
fn commands() -> usize {
    let wanted = COMMANDS as u64 * FILES_EACH + OWN_FILES;
    let permitted = getrlimit(Resource::Nofile).maximum;
    let limit = |most| Rlimit {
        current: Some(most),
        maximum: permitted.map(|permitted| permitted.max(most)),
    };
    let most = match setrlimit(Resource::Nofile, limit(wanted)) {
        Ok(()) => wanted,
        // Only a privileged process may have more than it was given.
        Err(_) => {
            let most = permitted.unwrap_or(wanted);
            setrlimit(Resource::Nofile, limit(most)).unwrap();
            most
        }
    };
    COMMANDS.min((most.saturating_sub(OWN_FILES) / FILES_EACH) as usize)
}

/// What others request meanwhile is answered: a list, a create, a VM.
async fn others_are_served(admin: &Client) {
    let page: VmPage = admin.get("/v1/vms", &()).await.unwrap();
    assert_eq!(page.vms.len(), 1);
    let create = CreateVms {
        template: "t".into(),
        count: 1,
        ..CreateVms::default()
    };
    let created: CreatedVms = admin.create("/v1/vms", &create, None).await.unwrap();
    let path = format!("/v1/vms/{}", created.vms[0].id);
    let vm: Vm = admin.get(&path, &()).await.unwrap();
    assert_eq!(vm.state, VmState::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_silent_guests_hold_no_threads_and_end_with_their_clients() {
    let count = commands();
    assert!(count > 10 * MOST_THREADS, "too few files may be open");
    let (server, mut agents) = with_silent_agents(count).await;
    let key = served::create_key(&server.records, "root", Role::Admin, None).await;
    let before = memory();
    let (server, secret) = (&server, key.secret.as_str());
    let clients = stream::iter(&mut agents)
        .map(|agent| async move {
            let client = exec(server, secret).await;
            request(agent).await;
            client
        })
        .buffer_unordered(STARTING);
    let clients: Vec<TcpStream> = clients.collect().await;
    let now = threads();
    assert!(now < MOST_THREADS, "{now} threads for {count} commands");
    let each = memory().saturating_sub(before) / count;
    println!("{count} commands: {now} threads, {each} KiB each");
    assert!(each < MOST_KIB, "{each} KiB for each command");
    tokio::time::timeout(LIMIT, others_are_served(&server.admin))
        .await
        .unwrap();
    drop(clients);
    join_all(agents.iter_mut().map(end)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exec_of_more_than_an_hour_is_refused_with_the_way_to_run_it() {
    let (server, _agents) = with_silent_agents(0).await;
    let body = json!({"command": ["true"], "timeout_ms": 3_600_001});
    let path = "/v1/vms/silent/exec";
    let refused: Result<Value, _> = server.admin.send(Method::POST, path, &body).await;
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("timeout_ms"), "{message}");
}
