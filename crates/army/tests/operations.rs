//! Operations over the API: what is answered before they end, and to whom they are told.
#![allow(clippy::unwrap_used)]

mod served;

use std::sync::Arc;

use army_api::ProblemKind;
use army_api::client::{Begun, Client, ClientError};
use army_api::keys::{CreateKey, NewKey, Role};
use army_api::operations::{
    Operation, OperationFilter, OperationKind, OperationPage, OperationState, Wait,
};
use army_api::vms::{CreateVms, CreatedVms};
use army_node_api::simulated::SimulatedNode;
use serde_json::Value;

use served::{Server, template};

/// The API over a host that creates a VM when the test says so.
async fn served() -> (Server, Arc<SimulatedNode>) {
    let host = Arc::new(SimulatedNode::new("here").gated());
    host.reports.release();
    let server = served::server_of(Arc::clone(&host) as _).await;
    let inserted = server.records.insert_template(&template("t")).await;
    inserted.unwrap();
    (server, host)
}

fn one(name: &str) -> CreateVms {
    CreateVms {
        template: "t".into(),
        count: 1,
        name: Some(name.to_owned()),
        ..CreateVms::default()
    }
}

async fn begin(client: &Client, name: &str, key: Option<&str>) -> Operation {
    let begun: Begun<CreatedVms> = client.begin("/v1/vms", &one(name), key, 0).await.unwrap();
    match begun {
        Begun::InProgress(operation) => *operation,
        Begun::Made(made) => panic!("{made:?}"),
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ProblemKind {
    match result.unwrap_err() {
        ClientError::Refused(problem) => problem.kind,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_does_not_wait_gets_its_operation_which_tells_how_it_ended() {
    let (server, host) = served().await;
    let user = server.client("red", Role::User).await;
    let operation = begin(&user, "a", Some("k")).await;
    assert_eq!(operation.kind, OperationKind::CreateVms);
    assert_eq!(operation.state, OperationState::Running);
    assert_eq!(operation.tenant, "red");
    // The same request joins it.
    assert_eq!(begin(&user, "a", Some("k")).await.id, operation.id);
    let path = format!("/v1/operations/{}", operation.id);
    let running: Operation = user.get(&path, &()).await.unwrap();
    assert!(running.created.is_none());
    host.creations.release();
    let wait = Wait { wait: Some(60) };
    let ended: Operation = user.get(&path, &wait).await.unwrap();
    assert_eq!(ended.state, OperationState::Succeeded);
    assert_eq!(ended.created.unwrap().vms[0].name, "a");
    // Now it is the answer, without waiting.
    let made = user.begin("/v1/vms", &one("a"), Some("k"), 0).await;
    let made: Begun<CreatedVms> = made.unwrap();
    assert!(matches!(made, Begun::Made(made) if made.vms[0].name == "a"));
    assert_eq!(host.requested_vms(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_response_names_the_operation_and_a_preference_is_as_good_as_a_parameter() {
    let (server, _host) = served().await;
    let response = reqwest::Client::new()
        .post(format!("{}/v1/vms", server.url))
        .bearer_auth(server.admin.key())
        .header("Prefer", "respond-async, wait=0")
        .json(&one("a"))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 202);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let operation: Operation = response.json().await.unwrap();
    assert_eq!(location, format!("/v1/operations/{}", operation.id));
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_are_told_to_their_tenant_and_to_administrators() {
    let (server, _host) = served().await;
    let red = server.client("red", Role::User).await;
    let blue = server.client("blue", Role::User).await;
    let operation = begin(&red, "a", None).await;
    let path = format!("/v1/operations/{}", operation.id);
    let hidden = blue.get::<Value>(&path, &()).await;
    assert_eq!(kind(hidden), ProblemKind::NotFound);
    let filter = OperationFilter {
        state: Some(OperationState::Running),
        ..OperationFilter::default()
    };
    let list = async |client: &Client| -> Vec<Operation> {
        let page: OperationPage = client.get("/v1/operations", &filter).await.unwrap();
        page.operations
    };
    assert!(list(&blue).await.is_empty());
    for client in [&red, &server.admin] {
        let listed = list(client).await;
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].id, operation.id);
    }
    let wrong = red.get::<Value>("/v1/operations?after=x", &()).await;
    assert_eq!(kind(wrong), ProblemKind::InvalidRequest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_not_made_twice_by_a_repeated_request() {
    let (server, _host) = served().await;
    let request = CreateKey::new("red", Role::User);
    let create = async || {
        let created = server
            .admin
            .create::<NewKey>("/v1/keys", &request, Some("k"));
        created.await
    };
    let made = create().await.unwrap();
    match create().await.unwrap_err() {
        ClientError::Refused(problem) => {
            assert_eq!(problem.kind, ProblemKind::Conflict);
            assert!(problem.detail.contains(&made.key.id), "{problem}");
        }
        other => panic!("{other}"),
    }
}
