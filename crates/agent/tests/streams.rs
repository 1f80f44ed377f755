//! Commands that are read by several hosts, again after a lost connection, and after their end.
#![allow(clippy::unwrap_used)]

mod local;

use agent_client::{Event, Running};
use agent_proto::messages::{Acknowledge, ErrorCode, Exec, Stream};

use local::{Agent, LIMIT, refusal};

fn shell(script: &str) -> Exec {
    Exec {
        command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        directory: "/".to_owned(),
        user: rustix::process::getuid().as_raw().to_string(),
        keep_ms: 60_000,
        ..Exec::default()
    }
}

/// The standard output and the exit status of a command.
async fn read(running: &mut Running) -> (String, Option<i32>) {
    let mut output = Vec::new();
    loop {
        let event = tokio::time::timeout(LIMIT, running.next_event());
        match event.await.unwrap().unwrap() {
            Event::Output(_, data) => output.extend(data),
            Event::Lost(..) => output.extend(b"..."),
            Event::Exited(exited) => return (String::from_utf8(output).unwrap(), exited.code),
        }
    }
}

#[tokio::test]
async fn several_hosts_read_a_command_and_its_end_stays_for_a_time() {
    let agent = Agent::start();
    let exec = Exec {
        input: true,
        ..shell("echo one; read line; echo $line; exit 5")
    };
    let mut running = agent.connect().await.exec(exec).await.unwrap();
    let id = running.started().id;
    let start = Acknowledge::default();
    let mut observers = Vec::new();
    for _ in 0..3 {
        observers.push(agent.connect().await.observe(id, start).await.unwrap());
    }
    running.write(b"two\n");
    let expected = ("one\ntwo\n".to_owned(), Some(5));
    assert_eq!(read(&mut running).await, expected);
    for observer in &mut observers {
        assert_eq!(read(observer).await, expected);
    }
    // It is over for everybody, and can still be read, from any byte on.
    let mut later = agent.connect().await.attach(id, start).await.unwrap();
    assert_eq!(read(&mut later).await, expected);
    let rest = Acknowledge {
        stdout_cursor: 4,
        ..start
    };
    let mut later = agent.connect().await.observe(id, rest).await.unwrap();
    assert_eq!(read(&mut later).await, ("two\n".to_owned(), Some(5)));
    let listed = agent.connect().await.commands().await.unwrap();
    assert!(listed.is_empty(), "its end was seen: {listed:?}");
}

#[tokio::test]
async fn a_command_that_is_not_kept_is_forgotten_with_its_end() {
    let agent = Agent::start();
    for keep_ms in [0, 1] {
        let exec = Exec {
            keep_ms,
            ..shell("exit 3")
        };
        let mut running = agent.connect().await.exec(exec).await.unwrap();
        let id = running.started().id;
        assert_eq!(read(&mut running).await.1, Some(3));
        let end = std::time::Instant::now() + LIMIT;
        loop {
            let attached = agent.connect().await.attach(id, Acknowledge::default());
            match attached.await {
                Err(error) => {
                    assert_eq!(refusal::<()>(Err(error)).0, ErrorCode::NotFound);
                    break;
                }
                Ok(_) => assert!(std::time::Instant::now() < end),
            }
        }
    }
}

#[tokio::test]
async fn what_was_not_acknowledged_comes_again_and_input_goes_on() {
    let agent = Agent::start();
    let exec = Exec {
        input: true,
        ..shell("cat")
    };
    let running = agent.connect().await.exec(exec).await.unwrap();
    let id = running.started().id;
    let mut running = running.acknowledged_by_caller();
    running.write(b"hello");
    let event = running.next_event().await.unwrap();
    assert_eq!(event, Event::Output(Stream::Stdout, b"hello".to_vec()));
    // The connection is lost, and the client has seen only a part.
    drop(running);
    let arrived = Acknowledge {
        stdout_cursor: 2,
        ..Acknowledge::default()
    };
    let mut running = agent.connect().await.attach(id, arrived).await.unwrap();
    assert_eq!(running.started().input_received, 5);
    running.write(b" world");
    running.end_input();
    assert_eq!(read(&mut running).await, ("llo world".to_owned(), Some(0)));
}

#[tokio::test]
async fn a_host_that_attaches_again_sends_no_more_input_than_the_agent_takes() {
    let agent = Agent::start();
    let exec = Exec {
        input: true,
        ..shell("read line; sleep 0.5; cat | wc -c")
    };
    let mut running = agent.connect().await.exec(exec).await.unwrap();
    let id = running.started().id;
    running.write(b"begin\n");
    // More than fits into the pipe waits in the agent.
    running.write(&vec![b'x'; 200_000]);
    let sent = tokio::time::timeout(std::time::Duration::from_millis(200), running.next_event());
    assert!(sent.await.is_err());
    drop(running);
    let start = Acknowledge::default();
    let mut running = agent.connect().await.attach(id, start).await.unwrap();
    let received = running.started().input_received;
    assert!(received > 6, "{received}");
    running.write(&vec![b'y'; 300_000]);
    running.end_input();
    let (output, _) = read(&mut running).await;
    assert_eq!(output.trim(), (received - 6 + 300_000).to_string());
}
