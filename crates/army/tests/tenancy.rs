//! Templates belong to tenants: who finds them by which name, and who may do what with them.
#![allow(clippy::unwrap_used)]

mod served;

use std::sync::Arc;
use std::time::Duration;

use army_api::ProblemKind;
use army_api::client::{Client, ClientError, segment};
use army_api::events::Event;
use army_api::keys::{CreateKey, KeyScope, Role};
use army_api::operations::{Operation, OperationState};
use army_api::templates::{ImportTemplate, Template, Visibility};
use army_api::tenants::Tenant;
use army_api::vms::{CreatedVms, Vm, VmPage};
use army_node_api::requests::TemplateFacts;
use army_node_api::simulated::SimulatedNode;
use futures_util::StreamExt;
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use served::{Postgres, Server, on_each_database, server_over};

const LIMIT: Duration = Duration::from_secs(60);

/// A server whose administrators have the public template `base`, and users of two tenants.
struct Army {
    server: Server,
    node: Arc<SimulatedNode>,
    admin: Client,
    red: Client,
    blue: Client,
}

async fn army(postgres: Option<Postgres>) -> Army {
    let node = Arc::new(SimulatedNode::new("here"));
    let facts = TemplateFacts {
        id: "0".repeat(32),
        memory_bytes: 1 << 30,
        vcpus: 2,
        ..TemplateFacts::default()
    };
    node.add_template("base", facts, b"base");
    let server = server_over(Arc::<SimulatedNode>::clone(&node), postgres).await;
    // The scheduler knows a host that has reported.
    server.controller.recover().await.unwrap();
    let body = json!({"name": "base"});
    let admin = server.admin.clone();
    send::<Template>(&admin, Method::POST, "/v1/templates", &body)
        .await
        .unwrap();
    Army {
        node,
        admin,
        red: server.client("red", Role::User).await,
        blue: server.client("blue", Role::User).await,
        server,
    }
}

type Answer<T> = Result<T, ClientError>;

async fn send<T: DeserializeOwned>(
    client: &Client,
    method: Method,
    path: &str,
    body: &Value,
) -> Answer<T> {
    client.send(method, path, body).await
}

async fn vm_of(client: &Client, template: &str) -> Answer<Vm> {
    let body = json!({ "template": template });
    let created: CreatedVms = send(client, Method::POST, "/v1/vms", &body).await?;
    Ok(created.vms.into_iter().next().unwrap())
}

/// A template of a VM of the caller's.
async fn snapshot(client: &Client, template: &str) -> Answer<Template> {
    let vm = vm_of(client, "/base").await?;
    let path = format!("/v1/vms/{}/snapshot", vm.id);
    let body = json!({ "template": template });
    send(client, Method::POST, &path, &body).await
}

fn path(template: &str) -> String {
    format!("/v1/templates/{}", segment(template))
}

async fn show(client: &Client, template: &str) -> Answer<Template> {
    client.get(&path(template), &()).await
}

async fn change(client: &Client, template: &str, body: Value) -> Answer<Template> {
    send(client, Method::PATCH, &path(template), &body).await
}

async fn tag(client: &Client, tag: &str, template: &str) -> Answer<Template> {
    let path = format!("/v1/tags/{}", segment(tag));
    send(client, Method::PUT, &path, &json!({ "template": template })).await
}

fn refusal<T: std::fmt::Debug>(answer: Answer<T>) -> (ProblemKind, String) {
    match answer {
        Err(ClientError::Refused(problem)) => (problem.kind, problem.detail),
        other => panic!("not refused: {other:?}"),
    }
}

fn kind<T: std::fmt::Debug>(answer: Answer<T>) -> ProblemKind {
    refusal(answer).0
}

async fn names(client: &Client) -> Vec<String> {
    let templates: Vec<Template> = client.get("/v1/templates", &()).await.unwrap();
    templates.iter().map(Template::full_name).collect()
}

async fn names_are_looked_up_in_the_callers_own_tenant(army: Army) {
    let Army {
        admin, red, blue, ..
    } = &army;
    // The name of a template of the administrators is free in each tenant.
    let own = snapshot(red, "base").await.unwrap();
    assert_eq!(own.tenant.as_deref(), Some("red"));
    assert_eq!(own.visibility, Visibility::Private);
    assert_eq!(vm_of(red, "base").await.unwrap().template, "red/base");
    assert_eq!(vm_of(red, "/base").await.unwrap().template, "base");
    assert_eq!(vm_of(blue, "base").await.unwrap().template, "base");
    // A name that a user publishes catches nobody who says a bare name, not even an administrator.
    snapshot(red, "tool").await.unwrap();
    let public = json!({"visibility": "public"});
    change(admin, "red/base", public.clone()).await.unwrap();
    change(admin, "red/tool", public).await.unwrap();
    assert_eq!(vm_of(blue, "base").await.unwrap().template, "base");
    assert_eq!(vm_of(admin, "base").await.unwrap().template, "base");
    assert_eq!(kind(vm_of(blue, "tool").await), ProblemKind::NotFound);
    assert_eq!(kind(vm_of(admin, "tool").await), ProblemKind::NotFound);
    assert_eq!(vm_of(blue, "red/tool").await.unwrap().template, "red/tool");
    // A user of the administrators' tenant is a user.
    let colleague = army.server.client("root", Role::User).await;
    snapshot(&colleague, "base").await.unwrap();
    assert_eq!(vm_of(admin, "base").await.unwrap().template, "base");
    // VMs are listed by the template that the caller means.
    let list = async |client: &Client, template: &str| -> usize {
        let page: VmPage = client
            .get("/v1/vms", &[("template", template)])
            .await
            .unwrap();
        page.vms.len()
    };
    assert_eq!(list(red, "base").await, 1);
    assert_eq!(list(red, "/base").await, 3);
    assert_eq!(list(blue, "red/tool").await, 1);
    assert_eq!(show(red, "base").await.unwrap().vms, 1);
}

async fn what_is_not_visible_is_answered_as_what_does_not_exist(army: Army) {
    let Army { red, blue, .. } = &army;
    snapshot(red, "secret").await.unwrap();
    tag(red, "stable", "secret").await.unwrap();
    let ask = async |name: &str| {
        let steps = json!([{"kind": "run", "command": ["true"]}]);
        let build = json!({"template": "b", "from": name, "steps": steps});
        let tag_path = format!("/v1/tags/{}", segment(name));
        vec![
            refusal(show(blue, name).await),
            refusal(vm_of(blue, name).await),
            refusal(change(blue, name, json!({"standbys": 1})).await),
            refusal(tag(blue, "mine", name).await),
            refusal(blue.plain(Method::DELETE, &path(name)).await),
            refusal(blue.plain(Method::DELETE, &tag_path).await),
            refusal(
                blue.bytes(&format!("{}/content", path(name)), &())
                    .await
                    .map(drop),
            ),
            refusal(send::<Value>(blue, Method::POST, "/v1/builds", &build).await),
        ]
    };
    let none = ask("red/none").await;
    assert!(
        none.iter().all(|(kind, _)| *kind == ProblemKind::NotFound),
        "{none:?}"
    );
    for name in ["red/secret", "red/stable"] {
        let asked = ask(name).await.into_iter();
        let alike = asked.map(|(kind, detail)| (kind, detail.replace(name, "red/none")));
        assert_eq!(alike.collect::<Vec<_>>(), none, "{name}");
    }
    // Nor is its name taken for others, which have it in their own tenant.
    snapshot(blue, "secret").await.unwrap();
    assert_eq!(names(blue).await, ["base", "blue/secret"]);
    assert_eq!(names(red).await, ["base", "red/secret"]);
    assert_eq!(names(&army.admin).await.len(), 3);
    // Hosts have them by different names.
    let on_host = army.node.templates();
    assert_eq!(on_host.len(), 3, "{on_host:?}");
}

async fn users_make_and_remove_templates_of_their_own_tenant(army: Army) {
    let Army { red, blue, .. } = &army;
    let made = snapshot(red, "mine").await.unwrap();
    assert_eq!(made.full_name(), "red/mine");
    let content = reqwest::Body::from("content");
    let import = ImportTemplate::default();
    let imported = format!("{}/content", path("imported"));
    red.put_bytes(&imported, &import, content).await.unwrap();
    let mut content = Box::pin(red.bytes(&imported, &()).await.unwrap());
    assert_eq!(content.next().await.unwrap().unwrap(), b"content");
    assert_eq!(names(red).await, ["base", "red/imported", "red/mine"]);
    tag(red, "latest", "mine").await.unwrap();
    assert_eq!(vm_of(red, "latest").await.unwrap().template, "red/mine");
    assert_eq!(show(red, "red/latest").await.unwrap().tags, ["latest"]);
    // A tag belongs to the tenant of its template, so nobody keeps others' templates by a tag.
    assert_eq!(kind(tag(red, "x", "base").await), ProblemKind::Forbidden);
    assert_eq!(
        kind(tag(red, "blue/x", "mine").await),
        ProblemKind::InvalidRequest
    );
    assert_eq!(kind(snapshot(red, "latest").await), ProblemKind::Conflict);
    assert_eq!(
        kind(tag(red, "imported", "mine").await),
        ProblemKind::Conflict
    );
    // Names of others' are theirs, and those of hosts are the administrators'.
    assert_eq!(kind(snapshot(red, "blue/x").await), ProblemKind::Forbidden);
    assert_eq!(kind(snapshot(red, "/x").await), ProblemKind::Forbidden);
    assert_eq!(
        kind(snapshot(red, "../x").await),
        ProblemKind::InvalidRequest
    );
    assert_eq!(
        kind(red.plain(Method::DELETE, &path("base")).await),
        ProblemKind::Forbidden
    );
    assert_eq!(
        kind(change(red, "base", json!({"standbys": 1})).await),
        ProblemKind::Forbidden
    );
    let register = json!({"name": made.stored_as()});
    let registered = send::<Value>(red, Method::POST, "/v1/templates", &register);
    assert_eq!(kind(registered.await), ProblemKind::Forbidden);
    let copy = json!({"host": "here"});
    let copies = format!("{}/copies", path("mine"));
    let copied = send::<Value>(red, Method::POST, &copies, &copy);
    assert_eq!(kind(copied.await), ProblemKind::Forbidden);
    // A viewer looks on.
    let viewer = army.server.client("red", Role::Viewer).await;
    assert_eq!(names(&viewer).await.len(), 3);
    assert_eq!(
        kind(viewer.plain(Method::DELETE, &path("mine")).await),
        ProblemKind::Forbidden
    );
    red.plain(Method::DELETE, "/v1/tags/latest").await.unwrap();
    red.plain(Method::DELETE, &path("imported")).await.unwrap();
    assert_eq!(names(red).await, ["base", "red/mine"]);
    assert_eq!(names(blue).await, ["base"]);
    // VMs of the template keep it.
    assert_eq!(
        kind(red.plain(Method::DELETE, &path("mine")).await),
        ProblemKind::Conflict
    );
}

async fn a_template_is_shared_by_its_owner_and_published_by_an_administrator(army: Army) {
    let Army {
        admin, red, blue, ..
    } = &army;
    snapshot(red, "kit").await.unwrap();
    let shared = change(red, "kit", json!({"shared_with": ["blue", "green"]})).await;
    let shared = shared.unwrap();
    assert_eq!(shared.visibility, Visibility::Shared);
    assert_eq!(shared.shared_with, ["blue", "green"]);
    assert_eq!(vm_of(blue, "red/kit").await.unwrap().template, "red/kit");
    assert_eq!(names(blue).await, ["base", "red/kit"]);
    // With whom else it was shared is not for them, nor is it theirs.
    assert_eq!(show(blue, "red/kit").await.unwrap().shared_with, [""; 0]);
    for body in [json!({"standbys": 1}), json!({"visibility": "private"})] {
        assert_eq!(
            kind(change(blue, "red/kit", body).await),
            ProblemKind::Forbidden
        );
    }
    let grey = army.server.client("grey", Role::User).await;
    assert_eq!(kind(show(&grey, "red/kit").await), ProblemKind::NotFound);
    change(red, "kit", json!({"visibility": "private"}))
        .await
        .unwrap();
    assert_eq!(kind(vm_of(blue, "red/kit").await), ProblemKind::NotFound);
    let public = json!({"visibility": "public"});
    assert_eq!(
        kind(change(red, "kit", public.clone()).await),
        ProblemKind::Forbidden
    );
    change(admin, "red/kit", public).await.unwrap();
    assert_eq!(vm_of(&grey, "red/kit").await.unwrap().template, "red/kit");
    // Its owner takes that back.
    change(red, "kit", json!({"visibility": "private"}))
        .await
        .unwrap();
    assert_eq!(kind(show(&grey, "red/kit").await), ProblemKind::NotFound);
    for wrong in [
        json!({"visibility": "public", "shared_with": ["blue"]}),
        json!({"shared_with": ["no tenant"]}),
        json!({"visibility": "everybody"}),
        json!({"shared_with": vec!["blue"; 101]}),
    ] {
        let refused = kind(change(admin, "red/kit", wrong.clone()).await);
        assert_eq!(refused, ProblemKind::InvalidRequest, "{wrong}");
    }
}

async fn what_an_administrator_takes_of_a_tenants_vm_stays_with_the_tenant(army: Army) {
    let Army {
        admin, red, blue, ..
    } = &army;
    let vm = vm_of(red, "base").await.unwrap();
    let path_of = |vm: &Vm| format!("/v1/vms/{}/snapshot", vm.id);
    let body = json!({"template": "taken"});
    let taken: Template = send(admin, Method::POST, &path_of(&vm), &body)
        .await
        .unwrap();
    assert_eq!(taken.full_name(), "red/taken");
    assert_eq!(taken.visibility, Visibility::Private);
    assert_eq!(kind(show(blue, "red/taken").await), ProblemKind::NotFound);
    // The operation is of the administrator's tenant, whose users do not see the template.
    let colleague = army.server.client("root", Role::User).await;
    let page: Value = colleague.get("/v1/operations", &()).await.unwrap();
    let operations = page["operations"].as_array().unwrap().iter();
    let mut operations = operations.filter(|it| it["kind"] == "snapshot_vm");
    let id = operations.next().unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = format!("/v1/operations/{id}");
    let seen: Operation = colleague.get(&path, &()).await.unwrap();
    assert_eq!(
        (seen.state, seen.template),
        (OperationState::Succeeded, None)
    );
    let seen: Operation = admin.get(&path, &()).await.unwrap();
    assert_eq!(seen.template.unwrap().full_name(), "red/taken");
    // What an administrator takes of their own tenant's VM is for everybody, as it always was.
    let own = vm_of(admin, "base").await.unwrap();
    let body = json!({"template": "golden"});
    let golden: Template = send(admin, Method::POST, &path_of(&own), &body)
        .await
        .unwrap();
    assert_eq!(golden.stored_as(), "golden");
    assert_eq!(vm_of(blue, "golden").await.unwrap().template, "golden");
}

async fn events_of_templates_reach_those_who_can_use_them(army: Army) {
    let Army {
        admin, red, blue, ..
    } = &army;
    let secret = snapshot(red, "secret").await.unwrap();
    tag(red, "stable", "secret").await.unwrap();
    change(admin, "/base", json!({"visibility": "private"}))
        .await
        .unwrap();
    tag(admin, "edge", "base").await.unwrap();
    change(admin, "red/secret", json!({"visibility": "public"}))
        .await
        .unwrap();
    assert_eq!(secret.full_name(), "red/secret");
    let seen = async |client: &Client, last: &str| {
        let events = client.events(Some(0)).await.unwrap();
        let mut events = Box::pin(events.map(Result::unwrap));
        let mut all: Vec<Event> = Vec::new();
        let read = async {
            while let Some(event) = events.next().await {
                let is_last = event.kind == "template.shared" && event.subject == last;
                all.push(event);
                if is_last {
                    break;
                }
            }
        };
        tokio::time::timeout(LIMIT, read).await.unwrap();
        let of_templates = all
            .into_iter()
            .filter(|it| it.kind.starts_with("template."));
        of_templates
            .map(|it| format!("{} {}", it.kind, it.subject))
            .collect::<Vec<_>>()
    };
    let registered = "template.registered base".to_owned();
    let shared = "template.shared red/secret".to_owned();
    assert_eq!(
        seen(blue, "red/secret").await,
        [registered.clone(), shared.clone()]
    );
    let own = [
        "template.registered red/secret",
        "template.tagged red/secret",
    ];
    let own = own.map(str::to_owned);
    let expected = [vec![registered], own.to_vec(), vec![shared]].concat();
    assert_eq!(seen(red, "red/secret").await, expected);
    let all = seen(admin, "red/secret").await;
    assert!(all.contains(&"template.tagged base".to_owned()), "{all:?}");
    // A private template of the administrators is theirs.
    assert_eq!(kind(vm_of(blue, "base").await), ProblemKind::NotFound);
    assert_eq!(vm_of(admin, "edge").await.unwrap().template, "base");
}

async fn a_key_for_templates_sees_the_operations_that_it_has_requested(army: Army) {
    let scoped = CreateKey {
        scope: Some(KeyScope::Templates),
        ..CreateKey::new("red", Role::User)
    };
    let key = army.server.records.create_key(&scoped).await.unwrap();
    let builder = Client::new(&army.server.url, key.secret).unwrap();
    let steps = json!([{"kind": "run", "command": ["true"]}]);
    let body = json!({"template": "built", "from": "base", "steps": steps});
    let begun: Operation = send(&builder, Method::POST, "/v1/builds?wait=0", &body)
        .await
        .unwrap();
    let own = format!("/v1/operations/{}?wait=60", begun.id);
    let ended: Operation = builder.get(&own, &()).await.unwrap();
    // No agent answers in the simulated guest.
    assert_eq!(ended.state, OperationState::Failed);
    vm_of(&army.red, "base").await.unwrap();
    let page: Value = army.red.get("/v1/operations", &()).await.unwrap();
    let operations = page["operations"].as_array().unwrap().iter();
    let mut operations = operations.filter(|it| it["kind"] == "create_vms");
    let other = operations.next().unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let other: Answer<Value> = builder.get(&format!("/v1/operations/{other}"), &()).await;
    assert_eq!(kind(other), ProblemKind::NotFound);
    let list: Answer<Value> = builder.get("/v1/operations", &()).await;
    assert_eq!(kind(list), ProblemKind::Forbidden);
}

/// The network policy of the VM that was requested of the host last.
fn asked_of_host(army: &Army) -> Value {
    let specs = army.node.requested_specs();
    serde_json::to_value(&specs.last().unwrap().network).unwrap()
}

async fn what_reaches_the_host_is_within_the_policy_of_the_tenant(army: Army) {
    let Army {
        admin, red, blue, ..
    } = &army;
    let set = async |policy: Value| -> Tenant {
        let body = json!({ "network": policy });
        send(admin, Method::PATCH, "/v1/tenants/red", &body)
            .await
            .unwrap()
    };
    let create = async |client: &Client, network: Value| -> Answer<Vm> {
        let body = json!({"template": "base", "network": network});
        let created: CreatedVms = send(client, Method::POST, "/v1/vms", &body).await?;
        Ok(created.vms.into_iter().next().unwrap())
    };
    let before = vm_of(red, "base").await.unwrap();
    // A VM says its address at once, and in lists.
    assert_eq!(before.addresses, ["192.0.2.1"]);
    let page: VmPage = red.get("/v1/vms", &()).await.unwrap();
    assert_eq!(page.vms[0].addresses, ["192.0.2.1"]);
    assert_eq!(asked_of_host(&army), Value::Null);
    let policy = json!({"egress": {"allow": ["10.0.0.0/8", "192.0.2.0/24"]}});
    let tenant = set(policy.clone()).await;
    assert_eq!(serde_json::to_value(tenant.network).unwrap(), policy);
    // What is not asked for, and what is asked for in vain.
    vm_of(red, "base").await.unwrap();
    assert_eq!(asked_of_host(&army), policy);
    create(red, json!({"egress": "full"})).await.unwrap();
    assert_eq!(asked_of_host(&army), policy);
    let asked = json!({"egress": {"allow": ["192.0.2.7", "198.51.100.0/24"]}});
    let vm = create(red, asked).await.unwrap();
    let narrow = json!({"egress": {"allow": ["192.0.2.7/32"]}});
    assert_eq!(asked_of_host(&army), narrow);
    assert_eq!(serde_json::to_value(vm.network).unwrap(), narrow);
    create(red, json!({"egress": {"allow": ["198.51.100.0/24"]}}))
        .await
        .unwrap();
    assert_eq!(asked_of_host(&army), json!({"egress": "none"}));
    vm_of(blue, "base").await.unwrap();
    assert_eq!(asked_of_host(&army), Value::Null);
    // A VM from before gets it with its next change, its next resumption, and in its forks.
    let path = format!("/v1/vms/{}", before.id);
    let fork = json!({"name": "fork"});
    let forked: Value = send(red, Method::POST, &format!("{path}/fork"), &fork)
        .await
        .unwrap();
    assert_eq!(forked["vms"][0]["network"], policy);
    assert_eq!(asked_of_host(&army), policy);
    let changed: Value = send(red, Method::PATCH, &path, &json!({"labels": {"a": "b"}}))
        .await
        .unwrap();
    assert_eq!(changed["network"], policy);
    let last = army.node.updates().pop().unwrap();
    assert_eq!(serde_json::to_value(last.network).unwrap(), policy);
    let none = json!({"egress": "none"});
    set(none.clone()).await;
    for action in ["pause", "resume"] {
        let path = format!("{path}/{action}");
        let _: Vm = send(red, Method::POST, &path, &json!({})).await.unwrap();
    }
    let last = army.node.updates().pop().unwrap();
    assert_eq!(serde_json::to_value(last.network).unwrap(), none);
    let steps = json!([{"kind": "run", "command": ["true"]}]);
    let build = json!({"template": "built", "from": "base", "steps": steps});
    let _: Answer<Value> = send(red, Method::POST, "/v1/builds?wait=60", &build).await;
    assert_eq!(asked_of_host(&army), none);
    set(Value::Null).await;
    create(red, json!({"egress": "full"})).await.unwrap();
    assert_eq!(asked_of_host(&army), json!({"egress": "full"}));
    // The host's own addresses and link-local ones are an administrator's to open.
    for wrong in [
        json!({"egress": "full", "host": true}),
        json!({"egress": {"allow": ["169.254.169.254/32"]}}),
    ] {
        assert_eq!(kind(create(red, wrong).await), ProblemKind::Forbidden);
    }
    let open = json!({"egress": "full", "host": true});
    create(admin, open.clone()).await.unwrap();
    assert_eq!(asked_of_host(&army), open);
    set(open.clone()).await;
    vm_of(red, "base").await.unwrap();
    assert_eq!(asked_of_host(&army), open);
    let wrong = json!({"network": {"egress": {"allow": ["example.org"]}}});
    let wrong = send::<Value>(admin, Method::PATCH, "/v1/tenants/red", &wrong);
    assert_eq!(kind(wrong.await), ProblemKind::InvalidRequest);
    let own = json!({"network": {"egress": "full"}});
    let own = send::<Value>(red, Method::PATCH, "/v1/tenants/red", &own);
    assert_eq!(kind(own.await), ProblemKind::Forbidden);
}

on_each_database! {
    with super::army;
    names_are_looked_up_in_the_callers_own_tenant,
    what_is_not_visible_is_answered_as_what_does_not_exist,
    users_make_and_remove_templates_of_their_own_tenant,
    a_template_is_shared_by_its_owner_and_published_by_an_administrator,
    what_an_administrator_takes_of_a_tenants_vm_stays_with_the_tenant,
    events_of_templates_reach_those_who_can_use_them,
    a_key_for_templates_sees_the_operations_that_it_has_requested,
    what_reaches_the_host_is_within_the_policy_of_the_tenant,
}
