//! Bursts of creates over simulated hosts, on which VMs use less than what is guessed.

use army_api::hosts::Capacity;
use army_node_api::simulated::SimulatedNode;
use futures_util::future::join_all;

use super::*;
use crate::{Database, Error, ErrorKind, Limits, Node};

/// What a VM costs on the simulated hosts: much less than what is guessed of a template of which no
/// VM was measured.
const COST: u64 = UNKNOWN_COST / 16;

/// The memory size of a VM.
const SIZE: u64 = 256 << 20;

/// A controller whose host has memory for so many VMs by what they use, and the template `t`.
async fn fleet(vms: u64, limits: Limits) -> (tempfile::TempDir, Arc<Controller>) {
    let dir = tempfile::tempdir().unwrap();
    let url = Database::sqlite_url(&dir.path().join("army.db"));
    let database = Database::open(&url).await.unwrap();
    let memory_bytes = vms * COST * 10 / 9 + UNKNOWN_COST;
    let host = SimulatedNode::new("here")
        .with_vm_cost(COST)
        .with_vm_size(SIZE)
        .with_capacity(Capacity {
            cpus: 2,
            memory_bytes,
            available_bytes: memory_bytes,
            ..Capacity::default()
        });
    let node: Node = Arc::new(host);
    let controller = Controller::of_one_host(database, node).with_limits(limits);
    let controller = Arc::new(controller);
    controller.recover().await.unwrap();
    let template = Template {
        name: "t".into(),
        host: "here".into(),
        memory_bytes: SIZE,
        ..Template::default()
    };
    let inserted = controller.store.insert_template(&template, None);
    inserted.await.unwrap();
    (dir, controller)
}

/// Requests so many VMs at once, while the host is polled. Returns the refusals.
async fn burst(controller: &Arc<Controller>, count: usize) -> Vec<Error> {
    let polling = tokio::spawn(Arc::clone(controller).reconcile());
    let requester = Requester {
        tenant: "default".into(),
        ..Requester::default()
    };
    let request = || CreateVms {
        template: "t".into(),
        count: 1,
        ..CreateVms::default()
    };
    let all = (0..count).map(|_| controller.create_and_wait(&requester, request()));
    let results = join_all(all).await;
    polling.abort();
    results.into_iter().filter_map(Result::err).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn none_of_100_creates_at_once_is_refused_where_there_is_room_by_what_vms_use() {
    let (_dir, controller) = fleet(100, Limits::default()).await;
    let refused = burst(&controller, 100).await;
    assert!(refused.is_empty(), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn none_of_1000_creates_at_once_is_refused_where_there_is_room_by_what_vms_use() {
    let (_dir, controller) = fleet(1000, Limits::default()).await;
    let refused = burst(&controller, 1000).await;
    assert!(
        refused.is_empty(),
        "{}: {:?}",
        refused.len(),
        refused.first()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_limit_of_promised_memory_holds_in_a_burst() {
    let limits = Limits {
        memory_promise: Some(2.0),
    };
    let (_dir, controller) = fleet(1000, limits).await;
    let host = controller.host("here").await.unwrap();
    let limit = 2 * host.capacity.unwrap().memory_bytes / SIZE;
    let refused = burst(&controller, 100).await;
    assert_eq!(100 - refused.len() as u64, limit);
    assert!(refused[0].message.contains("promised"), "{}", refused[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_that_exceeds_what_is_measured_is_refused_in_part() {
    let (_dir, controller) = fleet(10, Limits::default()).await;
    assert!(burst(&controller, 10).await.is_empty());
    let refused = burst(&controller, 100).await;
    assert!(!refused.is_empty());
    assert!(refused.iter().all(|error| error.kind == ErrorKind::Busy));
}
