//! Agents that keep to the protocol, and some that do not.

use std::future::Future;
use std::time::{Duration, Instant};

use agent_proto::messages::{
    Acknowledge, Empty, Exec, Exited, FileInfo, FromAgent, FromHost, Hello, Output, Put, Started,
    Stream, TerminalSize, from_agent::Kind, from_host,
};
use agent_proto::{CHUNK, INPUT_WINDOW, OUTPUT_WINDOW, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::*;

/// How long a test's exchange may take; agents here hold on for much longer.
const SHORT: Duration = Duration::from_millis(200);
/// What no exchange of [`SHORT`] may take, on a machine under load.
const LONG: Duration = Duration::from_secs(5);

fn encoded(kind: Kind) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
    bytes
}

fn hello() -> Vec<u8> {
    encoded(Kind::Hello(Hello {
        agent_version: "7".to_owned(),
        ..Hello::default()
    }))
}

fn started() -> Vec<u8> {
    encoded(Kind::Started(Started {
        id: 1,
        pid: 2,
        ..Started::default()
    }))
}

fn output(len: usize) -> Vec<u8> {
    encoded(Kind::Output(Output {
        data: vec![b'x'; len],
        ..Output::default()
    }))
}

fn exited() -> Vec<u8> {
    encoded(Kind::Exited(Exited {
        code: Some(3),
        ..Exited::default()
    }))
}

/// The beginning of a message that is half a mebibyte long.
fn long_message() -> Vec<u8> {
    vec![0, 0, 8, 0]
}

/// A connection to an agent that has greeted and then said `messages`, and the agent's end.
async fn greeted(messages: &[Vec<u8>]) -> (Connection, UnixStream) {
    let (ours, mut agent) = UnixStream::pair().unwrap();
    agent.write_all(&hello()).await.unwrap();
    agent.write_all(&messages.concat()).await.unwrap();
    let socket = AgentSocket::new(ours);
    let connection = Connection::greet(socket, Deadline::after(SHORT)).await;
    (connection.unwrap(), agent)
}

/// Writes `bytes` again and again, with a pause before each.
async fn repeat(mut agent: UnixStream, bytes: Vec<u8>, pause: Duration) {
    loop {
        tokio::time::sleep(pause).await;
        if agent.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// The next message of the host.
async fn heard(agent: &mut UnixStream, decoder: &mut frame::Decoder) -> from_host::Kind {
    loop {
        if let Some(message) = decoder.next::<FromHost>().unwrap() {
            return message.kind.unwrap();
        }
        let mut bytes = [0; 4096];
        let len = agent.read(&mut bytes).await.unwrap();
        assert!(len > 0, "the host hung up");
        decoder.push(&bytes[..len]);
    }
}

async fn assert_late<T>(what: &str, work: impl Future<Output = Result<T>>) {
    let begun = Instant::now();
    let error = work.await.map(drop).expect_err(what);
    assert!(matches!(error, ClientError::Late), "{what}: {error}");
    assert!(begun.elapsed() < LONG, "{what}: {:?}", begun.elapsed());
}

/// Connects to a VM that answers like this, and then is silent.
async fn opened(answer: &[u8]) -> Result<Connection> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let answer = answer.to_vec();
    let vm = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut line = [0; 13];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"CONNECT 1024\n");
        for byte in answer {
            stream.write_all(&[byte]).await.unwrap();
        }
        std::future::pending::<()>().await;
    });
    let opened = Connection::open(&path, Deadline::after(SHORT)).await;
    vm.abort();
    opened
}

#[tokio::test]
async fn an_agent_is_reached_by_its_vms_socket() {
    let connection = opened(&[b"OK 7\n".to_vec(), hello()].concat()).await;
    assert_eq!(connection.unwrap().hello().agent_version, "7");
    for answer in [&b"NO\n"[..], b"", b"OK 7\n", &[b'O'; 64]] {
        let error = opened(answer).await.map(drop).unwrap_err();
        assert!(matches!(error, ClientError::NoAgent), "{error}");
    }
}

#[tokio::test]
async fn a_vm_that_accepts_nobody_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let socket = tokio::net::UnixSocket::new_stream().unwrap();
    socket.bind(&path).unwrap();
    let _listener = socket.listen(0).unwrap();
    let begun = Instant::now();
    let mut waiting = Vec::new();
    for _ in 0..3 {
        waiting.push(
            Connection::open(&path, Deadline::after(SHORT))
                .await
                .map(drop),
        );
    }
    assert!(matches!(waiting.last(), Some(Err(ClientError::NoAgent))));
    assert!(begun.elapsed() < LONG);
}

#[tokio::test]
async fn no_exchange_outlives_its_deadline() {
    // An agent that says nothing, one that draws out a message, and one that says nothing at length.
    for (bytes, pause) in [
        (Vec::new(), LONG),
        (vec![0], Duration::from_millis(20)),
        (encoded(Kind::InputTaken(u64::MAX)), Duration::ZERO),
    ] {
        let begin = if bytes == [0] {
            long_message()
        } else {
            Vec::new()
        };
        let connection = async || {
            let (connection, agent) = greeted(std::slice::from_ref(&begin)).await;
            tokio::spawn(repeat(agent, bytes.clone(), pause));
            connection
        };
        assert_late("info", connection().await.info()).await;
        assert_late("commands", connection().await.commands()).await;
        assert_late("signal", connection().await.signal_command(1, 15)).await;
        assert_late("exec", connection().await.exec(Exec::default())).await;
        let attach = connection().await;
        assert_late("attach", attach.attach(1, Acknowledge::default())).await;
        assert_late("connect", connection().await.connect(80)).await;
        assert_late("get", connection().await.get("/f", ByteLimit::new(1))).await;
        let upload = connection().await.put(Put::default()).unwrap();
        assert_late("put", upload.finish()).await;
    }
}

#[tokio::test]
async fn an_agent_that_takes_nothing_is_given_up() {
    let (connection, _agent) = greeted(&[]).await;
    let mut upload = connection.put(Put::default()).unwrap();
    assert_late("put", async {
        while upload.write(&[0; CHUNK]).await? {}
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_flood_of_output_ends_at_the_limit() {
    let (mut connection, agent) = greeted(&[started()]).await;
    // It reads no acknowledgements.
    tokio::spawn(repeat(agent, output(CHUNK), Duration::ZERO));
    connection.set_deadline(Deadline::after(Duration::from_secs(60)));
    let running = connection.exec(Exec::default()).await.unwrap();
    let error = running.collect(ByteLimit::new(1 << 20)).await.unwrap_err();
    assert!(error.to_string().contains("1048576 bytes"), "{error}");
}

#[tokio::test]
async fn output_that_nobody_reads_stays_with_the_agent() {
    let (connection, mut agent) = greeted(&[started()]).await;
    let mut running = connection.exec(Exec::default()).await.unwrap().streaming();
    let flood = tokio::spawn(async move {
        let mut sent = 0;
        let message = output(CHUNK);
        while let Ok(Ok(())) = tokio::time::timeout(SHORT, agent.write_all(&message)).await {
            sent += CHUNK;
        }
        sent
    });
    assert!(matches!(running.next_event().await, Ok(Event::Output(..))));
    // What the kernel and one read hold, and not more.
    let sent = flood.await.unwrap();
    assert!(sent <= 2 << 20, "{sent} bytes were taken");
}

#[tokio::test]
async fn output_is_acknowledged_while_it_is_read() {
    let (connection, mut agent) = greeted(&[started()]).await;
    let mut running = connection.exec(Exec::default()).await.unwrap().streaming();
    let reader = tokio::spawn(async move { while running.next_event().await.is_ok() {} });
    let mut cursor = 0;
    let mut decoder = frame::Decoder::default();
    assert!(matches!(
        heard(&mut agent, &mut decoder).await,
        from_host::Kind::Request(_)
    ));
    while cursor < 4 * OUTPUT_WINDOW as u64 {
        let output = Output {
            cursor,
            data: vec![b'x'; CHUNK],
            ..Output::default()
        };
        agent
            .write_all(&encoded(Kind::Output(output)))
            .await
            .unwrap();
        cursor += CHUNK as u64;
        let message = heard(&mut agent, &mut decoder).await;
        let from_host::Kind::Acknowledge(arrived) = message else {
            panic!("{message:?}");
        };
        assert_eq!(arrived.stdout_cursor, cursor);
    }
    drop(agent);
    reader.await.unwrap();
}

#[tokio::test]
async fn input_signals_and_sizes_arrive_and_input_stays_within_its_window() {
    let (connection, mut agent) = greeted(&[started()]).await;
    let mut running = connection.exec(Exec::default()).await.unwrap().streaming();
    let input = vec![7; INPUT_WINDOW + 100];
    running.write(&input);
    running.end_input();
    assert!(!running.accepts_input());
    running.signal(15);
    running.signal(15);
    running.signal(1000);
    let size = TerminalSize {
        rows: 2,
        columns: 3,
    };
    running.resize(TerminalSize::default());
    running.resize(size);
    let command = tokio::spawn(async move { running.next_event().await });
    let mut decoder = frame::Decoder::default();
    let mut messages = Vec::new();
    let mut taken = 0;
    loop {
        let message = tokio::time::timeout(SHORT, heard(&mut agent, &mut decoder)).await;
        match message {
            Ok(from_host::Kind::Stdin(data)) => taken += data.len(),
            Ok(from_host::Kind::StdinEnd(_)) => break,
            Ok(message) => messages.push(message),
            // The command has not said that it took any.
            Err(_) => {
                assert_eq!(taken, INPUT_WINDOW);
                let credit = encoded(Kind::InputTaken(taken as u64));
                agent.write_all(&credit).await.unwrap();
            }
        }
    }
    assert_eq!(taken, input.len());
    assert_eq!(
        messages[1..],
        [from_host::Kind::Signal(15), from_host::Kind::Resize(size)]
    );
    agent.write_all(&exited()).await.unwrap();
    assert!(matches!(command.await.unwrap(), Ok(Event::Exited(_))));
    // The agent can forget the command.
    let last = heard(&mut agent, &mut decoder).await;
    assert!(matches!(last, from_host::Kind::Acknowledge(_)), "{last:?}");
}

#[tokio::test]
async fn calls_that_are_dropped_lose_nothing() {
    let (connection, mut agent) = greeted(&[started()]).await;
    let mut running = connection.exec(Exec::default()).await.unwrap().streaming();
    running.write(&[1; 1000]);
    let bytes = [output(3), output(4), exited()].concat();
    let mut events = Vec::new();
    for byte in bytes {
        agent.write_all(&[byte]).await.unwrap();
        let moment = Duration::from_millis(2);
        while let Ok(event) = tokio::time::timeout(moment, running.next_event()).await {
            let event = event.unwrap();
            let is_last = matches!(event, Event::Exited(_));
            events.push(event);
            if is_last {
                break;
            }
        }
    }
    let expected = [
        Event::Output(Stream::Stdout, vec![b'x'; 3]),
        Event::Output(Stream::Stdout, vec![b'x'; 4]),
    ];
    assert_eq!(events[..2], expected);
    assert!(matches!(events[2..], [Event::Exited(it)] if it.code == Some(3)));
    let mut decoder = frame::Decoder::default();
    heard(&mut agent, &mut decoder).await;
    let input = heard(&mut agent, &mut decoder).await;
    assert_eq!(input, from_host::Kind::Stdin(vec![1; 1000]));
}

#[tokio::test]
async fn whoever_drops_a_command_closes_its_connection() {
    let (connection, mut agent) = greeted(&[started()]).await;
    let mut running = connection.exec(Exec::default()).await.unwrap().streaming();
    let silent = tokio::time::timeout(SHORT, running.next_event()).await;
    assert!(silent.is_err(), "a stream may be silent");
    drop(running);
    let mut sent = Vec::new();
    let end = tokio::time::timeout(LONG, agent.read_to_end(&mut sent)).await;
    end.unwrap().unwrap();
}

#[tokio::test]
async fn a_guard_is_kept_until_the_last_use_of_a_connection() {
    let guard = std::sync::Arc::new(());
    let (connection, _agent) = greeted(&[started()]).await;
    let connection = connection.keeping(std::sync::Arc::clone(&guard));
    let running = connection.exec(Exec::default()).await.unwrap();
    assert_eq!(std::sync::Arc::strong_count(&guard), 2);
    drop(running);
    assert_eq!(std::sync::Arc::strong_count(&guard), 1);
}

#[tokio::test]
async fn files_are_read_up_to_their_limit() {
    let file = encoded(Kind::File(FileInfo::default()));
    let data = encoded(Kind::Data(vec![5; 10]));
    let done = encoded(Kind::Done(Empty {}));
    let (connection, _agent) = greeted(&[file.clone(), data.clone(), done]).await;
    let mut download = connection.get("/f", ByteLimit::new(10)).await.unwrap();
    assert_eq!(download.next().await.unwrap(), Some(vec![5; 10]));
    assert_eq!(download.next().await.unwrap(), None);
    let (connection, _agent) = greeted(&[file, data]).await;
    let mut download = connection.get("/f", ByteLimit::new(9)).await.unwrap();
    let refused = download.next().await;
    assert!(matches!(refused, Err(ClientError::TooMuch(_))));
}

#[tokio::test]
async fn a_file_that_comes_fast_enough_may_take_longer_than_the_deadline() {
    let file = encoded(Kind::File(FileInfo::default()));
    let (connection, agent) = greeted(&[file]).await;
    let data = encoded(Kind::Data(vec![0; CHUNK]));
    tokio::spawn(repeat(agent, data, SHORT / 4));
    let limit = ByteLimit::new(20 * CHUNK as u64);
    let mut download = connection.get("/f", limit).await.unwrap();
    // It comes to its limit, and not to its deadline.
    let error = loop {
        if let Err(error) = download.next().await {
            break error;
        }
    };
    assert!(matches!(error, ClientError::TooMuch(_)), "{error}");
}

#[tokio::test]
async fn a_file_that_is_refused_is_not_sent_whole() {
    let refusal = encoded(Kind::Error(agent_proto::messages::Error {
        message: "the disk is full".into(),
        ..Default::default()
    }));
    let (connection, _agent) = greeted(&[refusal]).await;
    let mut upload = connection.put(Put::default()).unwrap();
    let error = loop {
        if let Err(error) = upload.write(&[0; CHUNK]).await {
            break error;
        }
    };
    assert_eq!(error.to_string(), "the disk is full");
}

#[tokio::test]
async fn a_tunnel_has_two_directions() {
    let connected = encoded(Kind::Connected(Empty {}));
    let (connection, mut agent) = greeted(&[connected]).await;
    let mut tunnel = connection.connect(80).await.unwrap();
    tunnel.write(b"in");
    tunnel.end();
    // Without being read.
    tunnel.send().await.unwrap();
    let mut decoder = frame::Decoder::default();
    heard(&mut agent, &mut decoder).await;
    let data = heard(&mut agent, &mut decoder).await;
    assert_eq!(data, from_host::Kind::Data(b"in".to_vec()));
    let end = heard(&mut agent, &mut decoder).await;
    assert!(matches!(end, from_host::Kind::DataEnd(_)));
    let answer = [
        encoded(Kind::Data(b"out".to_vec())),
        encoded(Kind::Done(Empty {})),
    ];
    agent.write_all(&answer.concat()).await.unwrap();
    assert_eq!(tunnel.read().await.unwrap().as_deref(), Some(&b"out"[..]));
    assert_eq!(tunnel.read().await.unwrap(), None);
    drop(agent);
    assert_eq!(tunnel.read().await.unwrap(), None);
}
