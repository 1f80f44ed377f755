//! Agents of simulated guests, which say what a test lets them say.
// Each test program uses its part of it.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use agent_proto::frame::{self, Decoder};
use agent_proto::messages::{
    Empty, Exited, FromAgent, FromHost, Hello, Output, Started, from_agent::Kind, from_host,
    request::Operation,
};
use army::server::Doors;
use army_api::vms::VmState;
use army_node_api::simulated::SimulatedNode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::served::{Server, record, server_of, server_with};

/// The time limit for what should happen at once, on a machine under load.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The agent's end of a connection.
pub struct Agent {
    stream: UnixStream,
    decoder: Decoder,
}

/// A server with running VMs `vm-1`, `vm-2`, …, and the agents of the connections to come, which
/// have greeted.
pub async fn with_agents(
    vms: usize,
    connections: usize,
    change: impl FnOnce(Doors) -> Doors,
) -> (Server, Vec<Agent>) {
    let node = Arc::new(SimulatedNode::new("here"));
    let mut agents = Vec::new();
    for _ in 0..connections {
        agents.push(next_agent(&node, &[]).await);
    }
    let server = server_with(node, change).await;
    let vm = |number| record(&format!("{number:012x}"), &format!("vm-{number}"), "root");
    let vms: Vec<_> = (1..=vms).map(vm).collect();
    let records = &server.records;
    records.insert_vms(&vms, &BTreeMap::new()).await.unwrap();
    let ids: Vec<String> = vms.iter().map(|vm| vm.id.clone()).collect();
    records
        .set_vm_states(&ids, VmState::Running, "")
        .await
        .unwrap();
    (server, agents)
}

impl Agent {
    pub async fn send(&mut self, kind: Kind) {
        let mut bytes = Vec::new();
        frame::encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
        // The host may have hung up.
        let _ = self.stream.write_all(&bytes).await;
    }

    /// Says that the command has begun.
    pub async fn start(&mut self) {
        self.receive().await.unwrap();
        self.send(Kind::Started(Started {
            id: 1,
            pid: 2,
            ..Started::default()
        }))
        .await;
    }

    pub async fn print(&mut self, data: Vec<u8>) {
        let output = Output {
            data,
            ..Output::default()
        };
        self.send(Kind::Output(output)).await;
    }

    pub async fn exit(&mut self) {
        let exited = Exited {
            code: Some(0),
            ..Exited::default()
        };
        self.send(Kind::Exited(exited)).await;
    }

    pub async fn done(&mut self) {
        self.send(Kind::Done(Empty {})).await;
    }

    /// The next message of the host; `None` where it has hung up.
    pub async fn receive(&mut self) -> Option<from_host::Kind> {
        let receive = async {
            loop {
                if let Some(message) = self.decoder.next::<FromHost>().unwrap() {
                    return message.kind;
                }
                let mut bytes = [0; 4096];
                match self.stream.read(&mut bytes).await {
                    Ok(len) if len > 0 => self.decoder.push(&bytes[..len]),
                    _ => return None,
                }
            }
        };
        tokio::time::timeout(LIMIT, receive).await.unwrap()
    }

    /// The request of the connection.
    pub async fn request(&mut self) -> Operation {
        match self.receive().await {
            Some(from_host::Kind::Request(request)) => request.operation.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the host has hung up.
    pub async fn end(&mut self) {
        while self.receive().await.is_some() {}
    }
}

/// A server with the running VM `a`, and the simulated host of it.
pub async fn with_vm() -> (Server, Arc<SimulatedNode>) {
    let node = Arc::new(SimulatedNode::new("here"));
    let server = server_of(Arc::<SimulatedNode>::clone(&node)).await;
    let vms = [record("000000000001", "a", "root")];
    let records = &server.records;
    records.insert_vms(&vms, &BTreeMap::new()).await.unwrap();
    let ids = [vms[0].id.clone()];
    let running = records.set_vm_states(&ids, VmState::Running, "");
    running.await.unwrap();
    (server, node)
}

/// The agent's end of the next connection. The agent knows these operations.
pub async fn next_agent(node: &SimulatedNode, operations: &[u32]) -> Agent {
    let (ours, theirs) = UnixStream::pair().unwrap();
    node.add_agent(ours);
    let mut agent = Agent {
        stream: theirs,
        decoder: Decoder::default(),
    };
    let hello = Hello {
        operations: operations.to_vec(),
        ..Hello::default()
    };
    agent.send(Kind::Hello(hello)).await;
    agent
}
