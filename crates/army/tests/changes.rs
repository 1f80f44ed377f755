//! Changes of VMs through the API: what is recorded, what the host is asked for, and what happens
//! where both differ.
#![allow(clippy::unwrap_used)]

mod served;

use std::collections::BTreeMap;
use std::sync::Arc;

use army_api::checkpoints::{Checkpoint, Checkpoints, Rewound};
use army_api::client::ClientError;
use army_api::keys::Role;
use army_api::vms::{Vm, VmState};
use army_api::{Problem, ProblemKind};
use army_node_api::simulated::SimulatedNode;
use army_node_api::{Error, ErrorKind};
use reqwest::Method;
use serde_json::{Value, json};

use served::{Postgres, Server, on_each_database, record, server_over};

const PATH: &str = "/v1/vms/a";

/// A server with a VM that runs on a simulated host.
async fn with_vm(postgres: Option<Postgres>) -> (Server, Arc<SimulatedNode>) {
    let node = Arc::new(SimulatedNode::new("here"));
    node.add_vm("000000000001");
    let server = server_over(Arc::<SimulatedNode>::clone(&node), postgres).await;
    let mut vm = record("000000000001", "a", "root");
    vm.labels = [("team".to_owned(), "red".to_owned())].into();
    let ids = [vm.id.clone()];
    let records = &server.records;
    records.insert_vms(&[vm], &BTreeMap::new()).await.unwrap();
    let running = records.set_vm_states(&ids, VmState::Running, "");
    running.await.unwrap();
    (server, node)
}

async fn change(server: &Server, body: Value) -> Result<Vm, ClientError> {
    server.admin.send(Method::PATCH, PATH, &body).await
}

fn problem(result: Result<Vm, ClientError>) -> Problem {
    match result.unwrap_err() {
        ClientError::Refused(problem) => problem,
        other => panic!("{other}"),
    }
}

async fn what_is_mentioned_is_changed_and_the_host_is_asked_for_it(postgres: Option<Postgres>) {
    let (server, node) = with_vm(postgres).await;
    let body = json!({
        "ttl_s": 3600, "idle": {"after_s": 60, "action": "pause"},
        "network": {"egress": {"allow": ["10.0.0.0/8"]}}, "labels": {"stage": "test", "team": null},
    });
    let vm = change(&server, body).await.unwrap();
    assert!(vm.expires_ms.is_some() && vm.idle.is_some() && vm.network.is_some());
    assert_eq!(vm.labels, [("stage".to_owned(), "test".to_owned())].into());
    let asked = node.updates().pop().unwrap();
    let ttl_ms = asked.lifetime.unwrap().ttl_ms.unwrap();
    assert!((3_590_000..=3_600_000).contains(&ttl_ms), "{ttl_ms}");
    assert_eq!(asked.idle.unwrap().policy, vm.idle);
    // A list says the same.
    let page: army_api::vms::VmPage = server.admin.get("/v1/vms", &()).await.unwrap();
    assert_eq!(page.vms, std::slice::from_ref(&vm));
    // Labels are no concern of the host.
    let relabelled = change(&server, json!({"labels": {"a": "b"}}))
        .await
        .unwrap();
    assert_eq!(relabelled.expires_ms, vm.expires_ms);
    assert_eq!(node.updates().len(), 1);
    let freed = change(&server, json!({"ttl_s": null, "idle": null})).await;
    let freed = freed.unwrap();
    assert_eq!((freed.expires_ms, freed.idle), (None, None));
    assert_eq!(freed.network, vm.network);
    let asked = node.updates();
    assert_eq!(asked[1].lifetime.unwrap().ttl_ms, None);
    assert!(asked[1].revision > asked[0].revision);
}

async fn a_change_of_a_vm_that_has_ended_is_a_conflict(postgres: Option<Postgres>) {
    let (server, node) = with_vm(postgres).await;
    // It ends on its host while it is changed.
    let ended = Error::new(ErrorKind::Conflict, "the VM a has ended: nobody used it");
    node.refuse_updates(Some(ended));
    let refused = problem(change(&server, json!({"ttl_s": 60})).await);
    assert_eq!(refused.kind, ProblemKind::Conflict);
    assert!(refused.detail.contains("nobody used it"), "{refused}");
    let vm: Vm = server.admin.get(PATH, &()).await.unwrap();
    assert_eq!(vm.expires_ms, None, "the refused change was taken back");
    let ids = [vm.id.clone()];
    let over = server.records.set_vm_states(&ids, VmState::Ended, "over");
    over.await.unwrap();
    let path = format!("/v1/vms/{}", vm.id);
    let body = json!({"ttl_s": 60});
    let refused = problem(server.admin.send(Method::PATCH, &path, &body).await);
    assert_eq!(refused.kind, ProblemKind::Conflict);
    assert!(refused.detail.contains("over"), "{refused}");
}

async fn a_host_that_does_not_answer_applies_the_change_later(postgres: Option<Postgres>) {
    let (server, node) = with_vm(postgres).await;
    let silent = Error::new(ErrorKind::HostUnreachable, "the host here does not answer");
    node.refuse_updates(Some(silent));
    let refused = problem(change(&server, json!({"ttl_s": 60})).await);
    assert_eq!(refused.kind, ProblemKind::HostUnavailable);
    assert!(refused.detail.contains("is recorded"), "{refused}");
    let vm: Vm = server.admin.get(PATH, &()).await.unwrap();
    assert!(vm.expires_ms.is_some());
    node.refuse_updates(None);
    server.controller.recover().await.unwrap();
    let sent = node.updates();
    assert_eq!((sent.len(), sent[0].revision), (2, sent[1].revision));
    server.controller.recover().await.unwrap();
    assert_eq!(node.updates().len(), 2, "it is applied once");
}

async fn a_change_is_bounded_and_only_for_those_who_may(postgres: Option<Postgres>) {
    let (server, node) = with_vm(postgres).await;
    for body in [
        json!({"ttl_s": 0}),
        json!({"ttl_s": 315_360_001}),
        json!({"idle": {"after_s": 0, "action": "pause"}}),
        json!({"network": {"egress": {"allow": ["example.org"]}}}),
        json!({"labels": {"": "x"}}),
        json!({"surprise": 1}),
    ] {
        let refused = problem(change(&server, body.clone()).await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{body}");
    }
    let labels = |from: u32| -> BTreeMap<String, String> {
        (from..from + 40)
            .map(|it| (it.to_string(), String::new()))
            .collect()
    };
    change(&server, json!({"labels": labels(0)})).await.unwrap();
    let refused = problem(change(&server, json!({"labels": labels(40)})).await);
    assert!(refused.detail.contains("64 labels"), "{refused}");
    let viewer = server.client("root", Role::Viewer).await;
    let stranger = server.client("blue", Role::User).await;
    let body = json!({"ttl_s": 5});
    let refused = problem(viewer.send(Method::PATCH, PATH, &body).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    let path = "/v1/vms/000000000001";
    let refused = problem(stranger.send(Method::PATCH, path, &body).await);
    assert_eq!(refused.kind, ProblemKind::NotFound);
    assert_eq!(node.updates(), []);
}

async fn a_suspended_vm_is_listed_as_such_and_woken_by_a_command(postgres: Option<Postgres>) {
    let (server, _node) = with_vm(postgres).await;
    let suspend = format!("{PATH}/suspend");
    let vm: Vm = server
        .admin
        .send(Method::POST, &suspend, &())
        .await
        .unwrap();
    assert_eq!(vm.state, VmState::Suspended);
    // Its host reports the same.
    server.controller.recover().await.unwrap();
    let listed = async |state: &str| {
        let query = [("state", state)];
        let page: army_api::vms::VmPage = server.admin.get("/v1/vms", &query).await.unwrap();
        page.vms.len()
    };
    assert_eq!((listed("suspended").await, listed("running").await), (1, 0));
    // The guest of a simulated host has no agent; the VM is woken nevertheless.
    let exec = format!("{PATH}/exec");
    let body = json!({"command": ["true"]});
    let refused: Result<Value, ClientError> = server.admin.send(Method::POST, &exec, &body).await;
    refused.unwrap_err();
    assert_eq!((listed("suspended").await, listed("running").await), (0, 1));
}

async fn checkpoints_are_taken_listed_rewound_to_and_removed_by_those_who_may(
    postgres: Option<Postgres>,
) {
    let (server, _node) = with_vm(postgres).await;
    let path = format!("{PATH}/checkpoints");
    let take = |name: &'static str| {
        let (client, path) = (&server.admin, &path);
        async move {
            let body = json!({"name": name});
            client.send::<Checkpoint>(Method::POST, path, &body).await
        }
    };
    assert_eq!(take("one").await.unwrap().parent, None);
    let two = take("two").await.unwrap();
    assert_eq!(two.parent.as_deref(), Some("one"));
    let ClientError::Refused(taken) = take("two").await.unwrap_err() else {
        panic!("not refused");
    };
    assert_eq!(taken.kind, ProblemKind::Conflict);
    let rewind = format!("{PATH}/rewind");
    let back = json!({"checkpoint": "one"});
    let rewound: Rewound = server
        .admin
        .send(Method::POST, &rewind, &back)
        .await
        .unwrap();
    assert_eq!(rewound.checkpoint, "one");
    let list: Checkpoints = server.admin.get(&path, &()).await.unwrap();
    assert_eq!(
        (list.checkpoints.len(), list.present.as_deref()),
        (2, Some("one"))
    );
    let one = format!("{path}/one");
    let left: Checkpoints = server.admin.send(Method::DELETE, &one, &()).await.unwrap();
    assert_eq!(left.checkpoints.len(), 1);
    let unknown: Result<Rewound, ClientError> =
        server.admin.send(Method::POST, &rewind, &back).await;
    let ClientError::Refused(unknown) = unknown.unwrap_err() else {
        panic!("not refused");
    };
    assert_eq!(unknown.kind, ProblemKind::NotFound);
    // Viewers look, and strangers do not even that.
    let viewer = server.client("root", Role::Viewer).await;
    let seen: Checkpoints = viewer.get(&path, &()).await.unwrap();
    assert_eq!(seen.checkpoints, left.checkpoints);
    let body = json!({"checkpoint": "two"});
    let refused: Result<Rewound, ClientError> = viewer.send(Method::POST, &rewind, &body).await;
    let ClientError::Refused(refused) = refused.unwrap_err() else {
        panic!("not refused");
    };
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    let stranger = server.client("blue", Role::User).await;
    let of_root = "/v1/vms/000000000001/checkpoints";
    let hidden: Result<Checkpoints, ClientError> = stranger.get(of_root, &()).await;
    let ClientError::Refused(hidden) = hidden.unwrap_err() else {
        panic!("not refused");
    };
    assert_eq!(hidden.kind, ProblemKind::NotFound);
}

on_each_database! {
    checkpoints_are_taken_listed_rewound_to_and_removed_by_those_who_may,
    a_suspended_vm_is_listed_as_such_and_woken_by_a_command,
    what_is_mentioned_is_changed_and_the_host_is_asked_for_it,
    a_change_of_a_vm_that_has_ended_is_a_conflict,
    a_host_that_does_not_answer_applies_the_change_later,
    a_change_is_bounded_and_only_for_those_who_may,
}
