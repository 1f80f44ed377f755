//! The end of a server's process.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use army_api::client::Client;
use futures_util::StreamExt;
use rustix::process::{Pid, Signal, kill_process};

/// The limit for what should take seconds, on a machine under load.
const LIMIT: Duration = Duration::from_secs(60);

/// Starts a controller, and returns it with the URL and the key that it prints.
fn controller(state: &std::path::Path) -> (Child, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_army"))
        .args(["controller", "--listen", "127.0.0.1:0"])
        .args(["--cluster-listen", "127.0.0.1:0", "--state"])
        .arg(state)
        .env_remove("ARMY_DATABASE")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.find(|line| line.as_ref().unwrap().contains("ARMY_KEY="));
    let line = line.unwrap().unwrap();
    let value = |name: &str| {
        let words = line.split_whitespace();
        let mut values = words.filter_map(|word| word.strip_prefix(name));
        values.next().unwrap().to_owned()
    };
    (child, value("ARMY_URL="), value("ARMY_KEY="))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_asked_to_end_does_with_a_stream_of_events_open() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().to_owned();
    let started = tokio::task::spawn_blocking(move || controller(&path));
    let (mut server, url, key) = started.await.unwrap();
    let client = Client::new(url, key).unwrap();
    let mut events = loop {
        match client.events(Some(0)).await {
            Ok(events) => break Box::pin(events),
            // The key is printed before the server serves.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    assert_eq!(events.next().await.unwrap().unwrap().kind, "key.created");
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    let ended = tokio::task::spawn_blocking(move || server.wait().unwrap());
    let ended = tokio::time::timeout(LIMIT, ended).await.unwrap().unwrap();
    assert!(ended.success(), "{ended}");
    // The stream has come to its end, and was not cut off.
    assert!(events.next().await.is_none());
}
