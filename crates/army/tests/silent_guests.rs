//! Guests whose agents greet and then say nothing: what they cost the server, and what ends when a
//! client leaves.
#![allow(clippy::unwrap_used)]

mod served;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use agent_proto::frame;
use agent_proto::messages::{FromAgent, Hello, from_agent};
use army::server::{Doors, SessionLimits};
use army_api::vms::{VmPage, VmState};
use army_node_api::simulated::SimulatedNode;
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use served::{Server, record, server_with};

/// Commands at once: more than the threads that the server may have.
const COMMANDS: usize = 300;
/// The threads of this process, whose server has two workers and a database: far fewer than one for
/// each command.
const MOST_THREADS: usize = 60;
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
    (server, agents)
}

fn greeting() -> Vec<u8> {
    let hello = from_agent::Kind::Hello(Hello::default());
    let mut bytes = Vec::new();
    frame::encode(&FromAgent { kind: Some(hello) }, &mut bytes).unwrap();
    bytes
}

/// Starts commands that take as long as an exec may.
fn execs(server: &Server, count: usize) -> Vec<JoinHandle<()>> {
    let body = json!({"command": ["sleep", "3600"], "timeout_ms": 3_600_000});
    let start = |_| {
        let (client, body) = (server.admin.clone(), body.clone());
        tokio::spawn(async move {
            let path = "/v1/vms/silent/exec";
            let ended: Result<Value, _> = client.send(Method::POST, path, &body).await;
            panic!("a command of a silent agent ended: {ended:?}");
        })
    };
    (0..count).map(start).collect()
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_silent_guests_hold_no_threads_and_end_with_their_clients() {
    let (server, mut agents) = with_silent_agents(COMMANDS).await;
    let running = execs(&server, COMMANDS);
    join_all(agents.iter_mut().map(request)).await;
    let now = threads();
    assert!(now < MOST_THREADS, "{now} threads for {COMMANDS} commands");
    let page = server.admin.get("/v1/vms", &());
    let page: VmPage = tokio::time::timeout(LIMIT, page).await.unwrap().unwrap();
    assert_eq!(page.vms.len(), 1);
    for command in &running {
        command.abort();
    }
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
