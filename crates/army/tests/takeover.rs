//! Operations of a controller that dies in the middle of them: another one, which lives, finishes or
//! undoes each.
#![allow(clippy::unwrap_used)]

mod fleet;
mod served;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use army_api::hosts::{Host, HostState};
use army_api::operations::OperationState;
use army_api::vms::{CreateVms, SnapshotVm, Vm, VmState};
use army_controller::{
    Controller, Database, ErrorKind, Operation, Output, Result, StartedOperation,
};
use army_node_api::NodeApi;
use army_node_api::requests::TemplateFacts;
use army_node_api::simulated::SimulatedNode;
use tokio::runtime::{Builder, Runtime};

use fleet::{Running, alive, create, requester, shares, template, wait};
use served::{Postgres, record};

/// How long the other controller may take: the lease has to run out first.
const LIMIT: Duration = Duration::from_secs(60);

/// A controller with a runtime of its own, with which everything ends that it does.
struct Process {
    /// It is there until this is dropped.
    runtime: Option<Runtime>,
    running: Running,
}

impl Process {
    async fn start(url: &str, nodes: &[Arc<SimulatedNode>]) -> Self {
        let mut builder = Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let (url, nodes) = (url.to_owned(), nodes.to_vec());
        let running = runtime.spawn(async move {
            let database = Database::open(&url).await.unwrap();
            Running::of(database, &nodes).await
        });
        let running = running.await.unwrap();
        let runtime = Some(runtime);
        Self { runtime, running }
    }

    /// Begins an operation in this process, and returns its id.
    async fn begin<F>(&self, begin: impl FnOnce(Arc<Controller>) -> F) -> String
    where
        F: Future<Output = Result<StartedOperation>> + Send + 'static,
    {
        let runtime = self.runtime.as_ref().unwrap();
        let begun = runtime.spawn(begin(Arc::clone(&self.running.controller)));
        begun.await.unwrap().unwrap().id
    }

    fn kill(self) {
        drop(self);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Two controllers that share the hosts, all of which are ready.
async fn two(url: &str, nodes: &[Arc<SimulatedNode>]) -> (Process, Process) {
    let first = Process::start(url, nodes).await;
    template(&first.running.records, nodes).await;
    let second = Process::start(url, nodes).await;
    let share = nodes.len() / 2;
    wait("the hosts are shared out", LIMIT, async || {
        let shares = shares(&[&first.running, &second.running], nodes.len()).await;
        shares == Some(vec![share, share])
    })
    .await;
    for process in [&first, &second] {
        // The one that does not own a host knows its capacity when the owner has written it down.
        wait("every host can be chosen", LIMIT, async || {
            let hosts = process.running.controller.hosts().await.unwrap();
            let is_measured = |it: &Host| it.capacity.is_some_and(|it| it.available_bytes > 0);
            let can_be_chosen = |it: &Host| it.state == HostState::Ready && is_measured(it);
            hosts.iter().all(can_be_chosen)
        })
        .await;
    }
    (first, second)
}

/// What becomes of an operation by another controller.
async fn end(process: &Process, id: &str) -> Operation {
    let operation = process.running.controller.operation(id, None, LIMIT);
    let operation = operation.await.unwrap();
    assert_ne!(operation.state, OperationState::Running, "{operation:?}");
    operation
}

fn creation(name: &str, count: u32) -> CreateVms {
    CreateVms {
        template: "t".into(),
        name: Some(name.into()),
        count,
        ..CreateVms::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_is_finished_for_hosts_that_have_its_vms_and_undone_for_others() {
    let postgres = Postgres::start();
    let node = |name| Arc::new(SimulatedNode::new(name).with_gated_creations());
    let nodes = ["host-00", "host-01"].map(node);
    let url = postgres.create_database("army");
    let (first, second) = two(&url, &nodes).await;
    let of_both = first
        .begin(|it| async move { it.create(&requester(), creation("both", 2)).await })
        .await;
    for node in &nodes {
        node.creations.arrival().await;
    }
    let lost = first
        .begin(|it| async move { it.create(&requester(), creation("lost", 1)).await })
        .await;
    let records = &second.running.records;
    let creating = alive(records).await;
    assert_eq!(creating.len(), 3);
    first.kill();
    // One host goes on with the request of the dead controller, and all other requests are lost.
    let is_kept = |vm: &&Vm| vm.host == "host-00" && vm.name.starts_with("both");
    let kept = creating.values().find(is_kept).unwrap();
    nodes[0].add_vm(&kept.id);

    let ended = end(&second, &of_both).await;
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    let Some(Output::Vms(created)) = ended.output else {
        panic!("{ended:?}");
    };
    let running: Vec<(&str, VmState)> = created
        .vms
        .iter()
        .map(|vm| (vm.id.as_str(), vm.state))
        .collect();
    assert_eq!(running, [(kept.id.as_str(), VmState::Running)]);
    assert_eq!(created.failures.len(), 1);
    let ended = end(&second, &lost).await;
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    assert_eq!(alive(records).await.len(), 1);
    // Nothing of them is in the way of what is created next.
    nodes.iter().for_each(|node| node.creations.release());
    create(&second.running.controller).await.unwrap();
    for node in &nodes {
        assert_eq!(node.created_twice(), [""; 0]);
    }
    second.kill();
}

/// VMs that run, one on each host.
async fn vms(process: &Process, nodes: &[Arc<SimulatedNode>]) -> Vec<Vm> {
    let records = &process.running.records;
    let vms = nodes.iter().enumerate().map(|(number, node)| Vm {
        host: node.name().to_owned(),
        ..record(
            &format!("{number:012x}"),
            &format!("vm-{number}"),
            "default",
        )
    });
    let vms: Vec<Vm> = vms.collect();
    for (vm, node) in vms.iter().zip(nodes) {
        node.add_vm(&vm.id);
    }
    records.insert_vms(&vms, &BTreeMap::new()).await.unwrap();
    let ids: Vec<String> = vms.iter().map(|vm| vm.id.clone()).collect();
    let running = records.set_vm_states(&ids, VmState::Running, "");
    running.await.unwrap();
    let controller = &process.running.controller;
    let mut known = Vec::new();
    for id in &ids {
        known.push(controller.vm(id, "default", None).await.unwrap());
    }
    known
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_finished_where_its_host_has_it_and_undone_where_it_has_not() {
    let postgres = Postgres::start();
    let node = |name| Arc::new(SimulatedNode::new(name).with_gated_transfers());
    let nodes = ["host-00", "host-01"].map(node);
    let url = postgres.create_database("army");
    let (first, second) = two(&url, &nodes).await;
    let vms = vms(&first, &nodes).await;
    let snapshot = |vm: &Vm, name: &str| {
        let (vm, request) = (
            vm.clone(),
            SnapshotVm {
                template: name.into(),
                diff: false,
            },
        );
        move |it: Arc<Controller>| async move { it.snapshot(&requester(), &vm, request).await }
    };
    let taken = first.begin(snapshot(&vms[0], "taken")).await;
    let lost = first.begin(snapshot(&vms[1], "lost")).await;
    for node in &nodes {
        node.transfers.arrival().await;
    }
    let controller = &second.running.controller;
    let reserved = controller
        .snapshot(
            &requester(),
            &vms[1],
            SnapshotVm {
                template: "taken".into(),
                diff: false,
            },
        )
        .await;
    assert_eq!(reserved.unwrap_err().kind, ErrorKind::Conflict);
    first.kill();
    nodes[1].lose_template("lost");

    let ended = end(&second, &taken).await;
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    let template = controller.template(&requester(), "taken").await.unwrap();
    assert_eq!(template.hosts, ["host-00"]);
    let ended = end(&second, &lost).await;
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let missing = controller.template(&requester(), "lost").await.unwrap_err();
    assert_eq!(missing.kind, ErrorKind::NotFound);
    // Its name is free again.
    nodes[1].transfers.release();
    let again = second.begin(snapshot(&vms[1], "lost")).await;
    let ended = end(&second, &again).await;
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_of_a_template_goes_on_until_no_host_has_it() {
    let postgres = Postgres::start();
    let node = |name| Arc::new(SimulatedNode::new(name).with_gated_transfers());
    let nodes = ["host-00", "host-01"].map(node);
    for node in &nodes {
        node.add_template("t", TemplateFacts::default(), b"");
    }
    let url = postgres.create_database("army");
    let (first, second) = two(&url, &nodes).await;
    let removal = first
        .begin(|it| async move { it.remove_template(&requester(), "t").await })
        .await;
    for node in &nodes {
        node.transfers.arrival().await;
    }
    // One host has not done yet what its answer is about.
    nodes[1].add_template("t", TemplateFacts::default(), b"");
    first.kill();
    let controller = &second.running.controller;
    let refused = create(controller).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Conflict, "{refused}");
    nodes.iter().for_each(|node| node.transfers.release());

    let ended = end(&second, &removal).await;
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    for node in &nodes {
        assert_eq!(node.templates(), [""; 0]);
    }
    let missing = controller.template(&requester(), "t").await.unwrap_err();
    assert_eq!(missing.kind, ErrorKind::NotFound);
    second.kill();
}
