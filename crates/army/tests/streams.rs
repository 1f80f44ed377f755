//! Commands over a WebSocket: streams, input, signals, the end, and what was lost with a connection.
#![allow(clippy::unwrap_used)]

mod agents;
mod served;

use agent_proto::messages::{
    Acknowledge, Error, ErrorCode, Exited, Output, Started, Stream, from_agent::Kind, from_host,
    request::Operation,
};
use army_api::ProblemKind;
use army_api::exec::Ended;
use army_api::streams::{AttachStream, STDERR, STDIN, STDOUT, StreamEvent, StreamRequest};
use futures_util::{SinkExt, StreamExt};
use serde::Serialize;
use serde_json::json;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use agents::{Agent, LIMIT, next_agent, with_vm};
use served::Server;

type Socket = WebSocketStream<reqwest::Upgraded>;

async fn open(server: &Server, path: &str, query: &impl Serialize) -> Socket {
    let key = generate_key();
    let answer = server.admin.web_socket(path, query, &key).await.unwrap();
    let stream = answer.upgrade().await.unwrap();
    WebSocketStream::from_raw_socket(stream, Role::Client, None).await
}

async fn say(socket: &mut Socket, request: &StreamRequest) {
    let text = serde_json::to_string(request).unwrap();
    socket.send(Message::Text(text.into())).await.unwrap();
}

/// The next text or binary message.
async fn next(socket: &mut Socket) -> Message {
    loop {
        let message = tokio::time::timeout(LIMIT, socket.next()).await.unwrap();
        match message.unwrap().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}

async fn event(socket: &mut Socket) -> StreamEvent {
    let message = next(socket).await;
    serde_json::from_str(message.to_text().unwrap()).unwrap()
}

fn output(stream: Stream, cursor: u64, text: &str) -> Kind {
    Kind::Output(Output {
        stream: stream.into(),
        cursor,
        data: text.into(),
    })
}

async fn acknowledgement(agent: &mut Agent) -> Acknowledge {
    match agent.receive().await {
        Some(from_host::Kind::Acknowledge(arrived)) => arrived,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_has_separate_streams_input_signals_and_an_end() {
    let (server, node) = with_vm().await;
    let mut agent = next_agent(&node, &[]).await;
    let mut socket = open(&server, "/v1/vms/a/exec", &()).await;
    let start =
        json!({"kind": "start", "command": ["x"], "input": true, "environment": {"A": "B"}});
    let start = Message::Text(start.to_string().into());
    socket.send(start).await.unwrap();
    let Operation::Exec(exec) = agent.request().await else {
        panic!("no exec")
    };
    assert!(exec.input && exec.keep_ms > 0 && !exec.detached);
    assert_eq!(exec.environment, ["A=B"]);
    let started = Started {
        id: 7,
        pid: 9,
        ..Started::default()
    };
    agent.send(Kind::Started(started)).await;
    let expected = StreamEvent::Started {
        id: 7,
        pid: 9,
        input: 0,
    };
    assert_eq!(event(&mut socket).await, expected);
    let input = [&[STDIN], &b"in\xff"[..]].concat();
    socket.send(Message::Binary(input.into())).await.unwrap();
    say(&mut socket, &StreamRequest::EndInput).await;
    assert_eq!(
        agent.receive().await,
        Some(from_host::Kind::Stdin(b"in\xff".to_vec()))
    );
    assert!(matches!(
        agent.receive().await,
        Some(from_host::Kind::StdinEnd(_))
    ));
    agent.send(output(Stream::Stdout, 0, "out")).await;
    agent.send(output(Stream::Stderr, 0, "err")).await;
    let expected = |first: u8, text: &str| [&[first], text.as_bytes()].concat();
    assert_eq!(next(&mut socket).await.into_data(), expected(STDOUT, "out"));
    assert_eq!(next(&mut socket).await.into_data(), expected(STDERR, "err"));
    say(&mut socket, &StreamRequest::Signal { signal: 15 }).await;
    assert_eq!(agent.receive().await, Some(from_host::Kind::Signal(15)));
    let exited = Exited {
        signal: Some(15),
        ..Exited::default()
    };
    agent.send(Kind::Exited(exited)).await;
    let ended = Ended {
        signal: Some(15),
        ..Ended::default()
    };
    assert_eq!(event(&mut socket).await, StreamEvent::Ended(ended));
    assert!(next(&mut socket).await.is_close());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_has_not_acknowledged_is_not_acknowledged_to_the_agent() {
    let (server, node) = with_vm().await;
    let mut agent = next_agent(&node, &[]).await;
    let path = "/v1/vms/a/commands/7/stream";
    let query = AttachStream {
        stdout: 5,
        acknowledge: true,
        ..AttachStream::default()
    };
    let opened = tokio::spawn(async move {
        let socket = open(&server, path, &query).await;
        (server, socket)
    });
    let Operation::Attach(attach) = agent.request().await else {
        panic!("no attach")
    };
    assert_eq!(
        (attach.id, attach.stdout_cursor, attach.observe),
        (7, 5, false)
    );
    agent.send(Kind::Started(Started::default())).await;
    let (server, mut socket) = opened.await.unwrap();
    event(&mut socket).await;
    // Far more than what is acknowledged for clients that do not.
    let long = "x".repeat(60_000);
    for piece in 0..4 {
        agent
            .send(output(Stream::Stdout, 5 + piece * 60_000, &long))
            .await;
        next(&mut socket).await;
    }
    say(
        &mut socket,
        &StreamRequest::Acknowledge {
            stdout: 100,
            stderr: 9,
        },
    )
    .await;
    let arrived = acknowledgement(&mut agent).await;
    // Of the standard error nothing was sent.
    assert_eq!((arrived.stdout_cursor, arrived.stderr_cursor), (100, 0));
    drop(socket);
    assert_eq!(
        agent.receive().await,
        None,
        "the agent sees that its client is gone"
    );
    // A client that does not acknowledge has what it was sent.
    let mut agent = next_agent(&node, &[]).await;
    let opened = tokio::spawn(async move {
        let query = AttachStream {
            observe: true,
            ..AttachStream::default()
        };
        open(&server, path, &query).await
    });
    let Operation::Attach(attach) = agent.request().await else {
        panic!("no attach")
    };
    assert!(attach.observe);
    agent.send(Kind::Started(Started::default())).await;
    let mut socket = opened.await.unwrap();
    event(&mut socket).await;
    for piece in 0..2 {
        agent
            .send(output(Stream::Stdout, piece * 60_000, &long))
            .await;
        next(&mut socket).await;
    }
    assert_eq!(acknowledgement(&mut agent).await.stdout_cursor, 120_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_cannot_start_is_a_problem_that_says_why() {
    let (server, node) = with_vm().await;
    for first in [
        r#"{"kind":"end_input"}"#,
        "{",
        r#"{"kind":"start","command":[]}"#,
    ] {
        let mut socket = open(&server, "/v1/vms/a/exec", &()).await;
        socket.send(Message::Text(first.into())).await.unwrap();
        let StreamEvent::Failed { problem } = event(&mut socket).await else {
            panic!("{first}")
        };
        assert_eq!(problem.kind, ProblemKind::InvalidRequest, "{first}");
        assert!(next(&mut socket).await.is_close());
    }
    let mut agent = next_agent(&node, &[]).await;
    let mut socket = open(&server, "/v1/vms/a/exec", &()).await;
    let start = r#"{"kind":"start","command":["nothing"]}"#;
    socket.send(Message::Text(start.into())).await.unwrap();
    agent.request().await;
    let refused = Error {
        code: ErrorCode::NotFound.into(),
        message: "no such program".into(),
    };
    agent.send(Kind::Error(refused)).await;
    let StreamEvent::Failed { problem } = event(&mut socket).await else {
        panic!("it started")
    };
    assert_eq!(problem.kind, ProblemKind::NotFound);
    assert!(problem.detail.contains("no such program"));
}
