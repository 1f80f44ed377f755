//! Agents of simulated guests, which say what a test lets them say.
// Each test program uses its part of it.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use agent_proto::frame;
use agent_proto::messages::{
    Exited, FromAgent, FromHost, Hello, Output, Started, from_agent::Kind, from_host,
};
use army::server::Doors;
use army_api::vms::VmState;
use army_node_api::simulated::SimulatedNode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::served::{Server, record, server_with};

/// The time limit for what should happen at once, on a machine under load.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The agent's end of a connection.
pub struct Agent {
    stream: UnixStream,
    decoder: frame::Decoder,
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
        let (ours, theirs) = UnixStream::pair().unwrap();
        node.add_agent(ours);
        let mut agent = Agent {
            stream: theirs,
            decoder: frame::Decoder::default(),
        };
        agent.say(Kind::Hello(Hello::default())).await;
        agents.push(agent);
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
    pub async fn say(&mut self, kind: Kind) {
        let mut bytes = Vec::new();
        frame::encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// Says that the command has begun.
    pub async fn start(&mut self) {
        self.hear().await.unwrap();
        self.say(Kind::Started(Started { id: 1, pid: 2 })).await;
    }

    pub async fn print(&mut self, data: Vec<u8>) {
        let output = Output {
            data,
            ..Output::default()
        };
        self.say(Kind::Output(output)).await;
    }

    pub async fn exit(&mut self) {
        let exited = Exited {
            code: Some(0),
            ..Exited::default()
        };
        self.say(Kind::Exited(exited)).await;
    }

    /// The next message of the host; `None` where it has hung up.
    pub async fn hear(&mut self) -> Option<from_host::Kind> {
        let hear = async {
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
        tokio::time::timeout(LIMIT, hear).await.unwrap()
    }

    /// Waits until the host has hung up.
    pub async fn end(&mut self) {
        while self.hear().await.is_some() {}
    }
}
