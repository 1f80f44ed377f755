//! The API without guests: who may what, and what a hostile client gets.
#![allow(clippy::unwrap_used)]

mod served;

use std::collections::BTreeMap;

use army_api::client::{Client, ClientError};
use army_api::keys::{CreateKey, Key, Role};
use army_api::vms::{CreateVms, Egress, ForkTimes, NetworkPolicy, Vm, VmPage, VmState};
use army_api::{Problem, ProblemKind};
use army_controller::testing::Records;
use army_controller::{Database, ErrorKind};
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};

use served::{Postgres, Server, create_key, on_each_database, record, template};

on_each_database! {
    with crate::served::server;
    nothing_is_told_without_a_key_but_health_and_the_apis_description,
    roles_allow_what_they_say_and_the_last_administrator_stays,
    what_cannot_be_understood_is_a_problem_that_says_why,
    a_fork_that_fails_is_told_written_down_and_leaves_its_name_free,
    a_list_says_of_a_vm_what_is_said_of_it_alone,
    a_quota_and_a_drained_host_are_honest_refusals,
    a_tag_points_to_one_template_at_a_time_and_keeps_it,
    a_build_that_cannot_begin_is_refused_before_anything_is_done,
    labels_decide_which_hosts_a_vm_may_go_to,
    a_stream_that_is_no_template_leaves_nothing,
    a_lifetime_beyond_the_clock_is_refused_and_an_old_record_of_one_is_listed,
    a_record_that_cannot_be_read_does_not_hide_the_others,
    a_nul_is_refused_wherever_it_is_sent,
    a_name_means_the_callers_own_vm_and_another_tenants_is_named_with_its_tenant,
    users_see_which_hosts_there_are_and_not_what_they_are,
    a_stream_of_events_ends_with_the_key_that_opened_it,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_database_has_several_controllers() {
    let postgres = Postgres::start();
    let first = postgres.open().await;
    let second = postgres.open().await;
    let key = CreateKey::new("t", Role::User);
    for database in [&first, &second, &first] {
        Records::of(database).create_key(&key).await.unwrap();
    }
    let error = Database::open("mysql://x").await.map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::InvalidRequest);
}

fn problem(result: Result<Value, ClientError>) -> Problem {
    match result.unwrap_err() {
        ClientError::Refused(problem) => problem,
        other => panic!("{other}"),
    }
}

async fn nothing_is_told_without_a_key_but_health_and_the_apis_description(server: Server) {
    let nobody = Client::new(&server.url, "army_guess").unwrap();
    for path in [
        "/v1/vms",
        "/v1/hosts",
        "/v1/templates",
        "/v1/keys",
        "/metrics",
        "/v1/events",
    ] {
        let refused = problem(nobody.get(path, &()).await);
        assert_eq!(refused.kind, ProblemKind::Unauthorized, "{path}");
    }
    let ready: Value = nobody.get("/readyz", &()).await.unwrap();
    assert!(ready["version"].is_string());
    let health: Value = nobody.get("/healthz", &()).await.unwrap();
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    let document: Value = nobody.get("/openapi.json", &()).await.unwrap();
    assert!(document["paths"]["/v1/vms/{vm}/exec"]["post"].is_object());
}

async fn roles_allow_what_they_say_and_the_last_administrator_stays(server: Server) {
    let user = server.client("red", Role::User).await;
    let viewer = server.client("red", Role::Viewer).await;
    let refused = problem(user.get("/v1/keys", &()).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    let asked = json!({"template": "t"});
    let refused = problem(viewer.send(Method::POST, "/v1/vms", &asked).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    let refused = problem(user.send(Method::POST, "/v1/vms", &asked).await);
    assert_eq!(refused.kind, ProblemKind::NotFound, "{refused}");
    let keys: Vec<Key> = server.admin.get("/v1/keys", &()).await.unwrap();
    assert_eq!(keys.len(), 3);
    let admin = keys.iter().find(|key| key.role == Role::Admin).unwrap();
    let path = format!("/v1/keys/{}", admin.id);
    let refused = server.admin.plain(Method::DELETE, &path).await;
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("last administrator")
    );
    let red = keys.iter().find(|key| key.role == Role::User).unwrap();
    let path = format!("/v1/keys/{}", red.id);
    server.admin.plain(Method::DELETE, &path).await.unwrap();
    let refused = problem(user.get("/v1/vms", &()).await);
    assert_eq!(refused.kind, ProblemKind::Unauthorized);
}

async fn what_cannot_be_understood_is_a_problem_that_says_why(server: Server) {
    let admin = &server.admin;
    let post = async |body: &Value| admin.send::<Value>(Method::POST, "/v1/vms", body).await;
    for body in [
        json!({}),
        json!({"template": 7}),
        json!({"template": "t", "surprise": 1}),
        json!({"template": "t", "count": 0}),
        json!({"template": "t", "count": 1001}),
        json!({"template": "t", "count": -1}),
        json!({"template": "t", "name": "../x"}),
        json!({"template": "t", "ttl_s": 0}),
        json!({"template": "t", "environment": {"A=B": "x"}}),
        json!([]),
        json!("x"),
    ] {
        let refused = problem(post(&body).await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{body}");
    }
    for query in ["limit=x", "surprise=1", "after=x", "label==x", "state=odd"] {
        let refused = problem(admin.get(&format!("/v1/vms?{query}"), &()).await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{query}");
    }
    for path in ["vms/none", "nothing", "templates/none", "hosts/none"] {
        let refused = problem(admin.get(&format!("/v1/{path}"), &()).await);
        assert_eq!(refused.kind, ProblemKind::NotFound, "{path}");
    }
    // Paths are names: nothing outside the store is looked at.
    for name in ["../../etc", "/etc", "", "a/b", ".hidden"] {
        let asked = json!({"name": name});
        let refused = problem(admin.send(Method::POST, "/v1/templates", &asked).await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{name}");
    }
    let huge = json!({"template": "t".repeat(2 << 20)});
    assert_eq!(problem(post(&huge).await).kind, ProblemKind::TooLarge);
    let refused = problem(admin.send(Method::PUT, "/v1/vms", &()).await);
    assert_eq!(refused.status, 405);
}

async fn a_fork_that_fails_is_told_written_down_and_leaves_its_name_free(server: Server) {
    // The store knows it, and the host does not have it.
    server
        .records
        .insert_template(&template("lost"))
        .await
        .unwrap();
    let asked = CreateVms {
        template: "lost".into(),
        count: 1,
        name: Some("a".into()),
        ..CreateVms::default()
    };
    for _ in 0..2 {
        let result = server.admin.create("/v1/vms", &asked, Some("k")).await;
        assert_eq!(problem(result).kind, ProblemKind::NotFound);
    }
    let two = CreateVms {
        count: 2,
        ..asked.clone()
    };
    let refused = problem(server.admin.create("/v1/vms", &two, None).await);
    assert_eq!(refused.kind, ProblemKind::NotFound);
    assert!(refused.detail.contains("none of the 2 VMs"), "{refused}");
    let page = async |query: &str| -> VmPage {
        let path = format!("/v1/vms?{query}");
        server.admin.get(&path, &()).await.unwrap()
    };
    let first = page("all=true&limit=3").await;
    assert_eq!((first.vms.len(), first.next.as_deref()), (3, Some("3")));
    assert!(first.vms.iter().all(|vm| vm.reason.is_some()));
    let second = page("all=true&after=3").await;
    assert_eq!((second.vms.len(), second.next), (1, None));
    assert_eq!(page("").await.vms, []);
}

async fn a_list_says_of_a_vm_what_is_said_of_it_alone(server: Server) {
    let odd = "it said \"no\" \\ and\nleft, äöü";
    let vm = |number: u64| Vm {
        id: format!("{number:012x}"),
        name: format!("vm-{number}"),
        tenant: "default".to_owned(),
        template: "t".to_owned(),
        host: "here".to_owned(),
        state: VmState::Creating,
        reason: None,
        labels: BTreeMap::from([("said".to_owned(), odd.to_owned())]),
        created_ms: 1_800_000_000_000 + number,
        expires_ms: (number > 1).then_some(1_900_000_000_000),
        network: (number > 1).then_some(NetworkPolicy {
            egress: Egress::None,
            host: false,
        }),
        idle: None,
        fork: None,
        addresses: Vec::new(),
        notices: Vec::new(),
        memory: None,
    };
    let vms: Vec<Vm> = (1..=3).map(vm).collect();
    let records = &server.records;
    records.insert_vms(&vms, &BTreeMap::new()).await.unwrap();
    let times = ForkTimes {
        warm: true,
        total_us: 5000,
        ..ForkTimes::default()
    };
    let notices = vec![odd.to_owned(), "no disk".to_owned()];
    let forked = records.record_fork(&vms[1].id, times, &notices);
    forked.await.unwrap();
    let failed = std::slice::from_ref(&vms[2].id);
    let state = VmState::Failed;
    records.set_vm_states(failed, state, odd).await.unwrap();
    let list = async |query: &[(&str, &str)]| -> VmPage {
        let query: BTreeMap<_, _> = query.iter().copied().collect();
        server.admin.get("/v1/vms", &query).await.unwrap()
    };
    let all = list(&[("all", "true")]).await.vms;
    assert_eq!(all.len(), 3);
    for listed in &all {
        assert_eq!(*listed, records.vm(&listed.id).await.unwrap());
    }
    assert_eq!((&all[0], &all[1].fork), (&vms[0], &Some(times)));
    assert_eq!(all[1].notices, notices);
    assert_eq!(all[2].reason.as_deref(), Some(odd));
    let label = format!("said={odd}");
    assert_eq!(list(&[("label", &label)]).await.vms.len(), 2);
    assert_eq!(list(&[("label", "said=yes")]).await.vms, []);
    assert_eq!(list(&[("template", "u")]).await.vms, []);
}

async fn a_quota_and_a_drained_host_are_honest_refusals(server: Server) {
    server
        .records
        .insert_template(&template("t"))
        .await
        .unwrap();
    let poor = create_key(&server.records, "poor", Role::User, Some(1)).await;
    let poor = Client::new(&server.url, poor.secret).unwrap();
    let asked = json!({"template": "t", "count": 2});
    let refused = problem(poor.send(Method::POST, "/v1/vms", &asked).await);
    assert_eq!(refused.kind, ProblemKind::QuotaExceeded);
    let path = "/v1/hosts/here/drain";
    let drained: Value = server.admin.send(Method::POST, path, &()).await.unwrap();
    assert_eq!(drained["state"], "draining");
    let refused = problem(server.admin.send(Method::POST, "/v1/vms", &asked).await);
    assert_eq!(refused.kind, ProblemKind::Busy);
    assert_eq!((refused.status, refused.retry_after_s), (429, Some(5)));
}

async fn a_tag_points_to_one_template_at_a_time_and_keeps_it(server: Server) {
    for name in ["v1", "v2"] {
        server
            .records
            .insert_template(&template(name))
            .await
            .unwrap();
    }
    let admin = &server.admin;
    let tag = async |tag: &str, template: &str| {
        let asked = json!({ "template": template });
        let path = format!("/v1/tags/{tag}");
        admin.send::<Value>(Method::PUT, &path, &asked).await
    };
    assert_eq!(
        tag("latest", "v1").await.unwrap()["tags"],
        json!(["latest"])
    );
    assert_eq!(tag("latest", "v2").await.unwrap()["name"], "v2");
    let all: Value = admin.get("/v1/templates", &()).await.unwrap();
    assert_eq!(
        (&all[0]["tags"], &all[1]["tags"]),
        (&json!([]), &json!(["latest"]))
    );
    assert_eq!(problem(tag("v1", "v2").await).kind, ProblemKind::Conflict);
    assert_eq!(problem(tag("x", "none").await).kind, ProblemKind::NotFound);
    assert_eq!(
        problem(tag("a%2Fb", "v1").await).kind,
        ProblemKind::InvalidRequest
    );
    let refused = server.records.insert_template(&template("latest")).await;
    assert_eq!(refused.unwrap_err().kind, ErrorKind::Conflict);
    // It is found by its tag: what fails is that its host does not have it.
    let asked = json!({"template": "latest"});
    let refused = problem(admin.send(Method::POST, "/v1/vms", &asked).await);
    assert!(refused.detail.contains("v2"), "{refused}");
    let refused = admin.plain(Method::DELETE, "/v1/templates/v2").await;
    assert!(refused.unwrap_err().to_string().contains("latest"));
    admin
        .plain(Method::DELETE, "/v1/tags/latest")
        .await
        .unwrap();
    admin
        .plain(Method::DELETE, "/v1/templates/v2")
        .await
        .unwrap();
    let refused = admin.plain(Method::DELETE, "/v1/tags/latest").await;
    assert!(refused.unwrap_err().to_string().contains("not found"));
}

async fn a_build_that_cannot_begin_is_refused_before_anything_is_done(server: Server) {
    server
        .records
        .insert_template(&template("base"))
        .await
        .unwrap();
    server.records.tag("latest", "base").await.unwrap();
    let build = async |name: &str, from: &str, steps: Value| {
        let asked = json!({"template": name, "from": from, "steps": steps});
        problem(server.admin.send(Method::POST, "/v1/builds", &asked).await)
    };
    let run = json!([{"kind": "run", "command": ["true"]}]);
    let write =
        |path: &str, mode: &str| json!([{"kind": "write", "path": path, "text": "", "mode": mode}]);
    for (name, from, steps, expected) in [
        ("new", "base", json!([]), ProblemKind::InvalidRequest),
        (
            "new",
            "base",
            json!([{"kind": "run", "command": []}]),
            ProblemKind::InvalidRequest,
        ),
        (
            "new",
            "base",
            write("here", "644"),
            ProblemKind::InvalidRequest,
        ),
        (
            "new",
            "base",
            write("/x", "999"),
            ProblemKind::InvalidRequest,
        ),
        ("a/b/c", "base", run.clone(), ProblemKind::InvalidRequest),
        ("new", "red/none", run.clone(), ProblemKind::NotFound),
        ("new", "none", run.clone(), ProblemKind::NotFound),
        ("base", "base", run.clone(), ProblemKind::Conflict),
        ("latest", "base", run.clone(), ProblemKind::Conflict),
    ] {
        let refused = build(name, from, steps).await;
        assert_eq!(refused.kind, expected, "{name}: {refused}");
    }
    let vms: VmPage = server.admin.get("/v1/vms?all=true", &()).await.unwrap();
    assert_eq!(vms.vms, []);
    // One whose VM cannot be made is answered as the VM's creation is.
    let refused = build("new", "latest", run).await;
    assert!(refused.detail.contains("base"), "{refused}");
    let key = create_key(&server.records, "red", Role::User, None).await;
    let user = Client::new(&server.url, key.secret).unwrap();
    let run = json!([{"kind": "run", "command": ["true"]}]);
    let asked = json!({"template": "blue/new", "from": "base", "steps": run});
    let refused = problem(user.send(Method::POST, "/v1/builds", &asked).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    let viewer = server.client("red", Role::Viewer).await;
    let asked = json!({"template": "new", "from": "base", "steps": run});
    let refused = problem(viewer.send(Method::POST, "/v1/builds", &asked).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
}

async fn labels_decide_which_hosts_a_vm_may_go_to(server: Server) {
    server
        .records
        .insert_template(&template("t"))
        .await
        .unwrap();
    let label = async |labels: Value| {
        let asked = json!({ "labels": labels });
        let admin = &server.admin;
        admin
            .send::<Value>(Method::PATCH, "/v1/hosts/here", &asked)
            .await
    };
    let create = async || {
        let asked = json!({"template": "t", "host_labels": {"gpu": "yes"}});
        problem(server.admin.send(Method::POST, "/v1/vms", &asked).await)
    };
    let refused = create().await;
    assert_eq!(refused.kind, ProblemKind::Busy);
    assert!(refused.detail.contains("labels"), "{refused}");
    let host = label(json!({"gpu": "yes", "rack": "7"})).await.unwrap();
    assert_eq!(host["labels"], json!({"gpu": "yes", "rack": "7"}));
    // It is placed; that its host has no such template is another matter.
    assert_eq!(create().await.kind, ProblemKind::NotFound);
    let host = label(json!({"gpu": null})).await.unwrap();
    assert_eq!(host["labels"], json!({"rack": "7"}));
    assert_eq!(create().await.kind, ProblemKind::Busy);
    let refused = problem(label(json!({"": "x"})).await);
    assert_eq!(refused.kind, ProblemKind::InvalidRequest);
}

async fn a_stream_that_is_no_template_leaves_nothing(server: Server) {
    let admin = &server.admin;
    let path = "/v1/templates/new/content";
    for bytes in [b"".as_slice(), b"x", &[0; 100_000]] {
        let refused = admin.put_bytes(path, &(), bytes.to_vec()).await;
        let ClientError::Refused(refused) = refused.unwrap_err() else {
            panic!("no answer");
        };
        assert!(refused.status < 500, "{refused}");
    }
    for (name, expected) in [
        ("..%2Fx", "invalid tenant name"),
        ("x%2F..%2Fy", "invalid template name"),
        (".x", "invalid template name"),
    ] {
        let path = format!("/v1/templates/{name}/content");
        let refused = admin.put_bytes(&path, &(), b"x".to_vec()).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
    }
    let all: Value = admin.get("/v1/templates", &()).await.unwrap();
    assert_eq!(all, json!([]));
    let left = std::fs::read_dir(server.dir.path().join("templates"));
    assert_eq!(left.map_or(0, Iterator::count), 0);
    let refused = problem(admin.get(path, &()).await);
    assert_eq!(refused.kind, ProblemKind::NotFound);
}

async fn a_lifetime_beyond_the_clock_is_refused_and_an_old_record_of_one_is_listed(server: Server) {
    let records = &server.records;
    records.insert_template(&template("t")).await.unwrap();
    for body in [
        json!({"template": "t", "ttl_s": 9_300_000_000_000_000_u64}),
        json!({"template": "t", "ttl_s": 315_360_001}),
        json!({"template": "t", "idle": {"after_s": u64::MAX, "action": "pause"}}),
    ] {
        let refused = problem(server.admin.send(Method::POST, "/v1/vms", &body).await);
        assert_eq!(
            refused.kind,
            ProblemKind::InvalidRequest,
            "{body}: {refused}"
        );
    }
    let mut old = record("0a0b0c0d0e0f", "a", "root");
    old.expires_ms = Some(u64::MAX);
    let vms = std::slice::from_ref(&old);
    records.insert_vms(vms, &BTreeMap::new()).await.unwrap();
    let page: VmPage = server.admin.get("/v1/vms?all=true", &()).await.unwrap();
    assert_eq!(page.vms.len(), 1);
    assert_eq!(page.vms[0].expires_ms, Some(i64::MAX as u64));
    assert_eq!(page.vms[0], records.vm(&old.id).await.unwrap());
}

async fn a_record_that_cannot_be_read_does_not_hide_the_others(server: Server) {
    let records = &server.records;
    let ids = ["000000000001", "000000000002", "000000000003"];
    let vms = ids.map(|id| record(id, &format!("vm-{id}"), "root"));
    records.insert_vms(&vms, &BTreeMap::new()).await.unwrap();
    records.spoil_vm(ids[1]).await.unwrap();
    let page: VmPage = server.admin.get("/v1/vms?limit=2", &()).await.unwrap();
    // The page is full: it has a VM more in the place of the one that is left out.
    assert_eq!((page.vms.len(), page.next.as_deref()), (2, None));
    let page: VmPage = server.admin.get("/v1/vms?all=true", &()).await.unwrap();
    let listed: Vec<&str> = page.vms.iter().map(|vm| vm.id.as_str()).collect();
    assert_eq!(listed, [ids[0], ids[2]]);
    records.apply_node_report(&[]).await.unwrap();
}

async fn a_nul_is_refused_wherever_it_is_sent(server: Server) {
    let admin = &server.admin;
    server
        .records
        .insert_template(&template("t"))
        .await
        .unwrap();
    for path in [
        "/v1/vms/a%00b",
        "/v1/templates/%00",
        "/v1/vms?template=%00",
        "/v1/hosts/%00",
    ] {
        let refused = problem(admin.get(path, &()).await);
        assert_eq!(
            refused.kind,
            ProblemKind::InvalidRequest,
            "{path}: {refused}"
        );
    }
    for body in [
        json!({"template": "\0"}),
        json!({"template": "t", "labels": {"a": "\0"}}),
        json!({"template": "t", "labels": {"\0": "a"}}),
        json!({"template": "t", "environment": {"A": "\0"}}),
    ] {
        let refused = problem(admin.send(Method::POST, "/v1/vms", &body).await);
        assert_eq!(
            refused.kind,
            ProblemKind::InvalidRequest,
            "{body}: {refused}"
        );
    }
    let large =
        json!({"template": "t", "environment": {"A": "x".repeat(32768), "B": "x".repeat(32768)}});
    let refused = problem(admin.send(Method::POST, "/v1/vms", &large).await);
    assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{refused}");
}

async fn a_name_means_the_callers_own_vm_and_another_tenants_is_named_with_its_tenant(
    server: Server,
) {
    let records = &server.records;
    let own = record("000000000001", "anna", "root");
    // A tenant lies in wait: its VM is newer.
    let others = record("000000000002", "anna", "red");
    let only_theirs = record("000000000003", "bert", "red");
    for vm in [&own, &others, &only_theirs] {
        let vms = std::slice::from_ref(vm);
        records.insert_vms(vms, &BTreeMap::new()).await.unwrap();
    }
    let get = async |client: &Client, vm: &str| -> Result<String, ProblemKind> {
        let path = format!("/v1/vms/{}", army_api::client::segment(vm));
        let found = client.get::<Value>(&path, &()).await;
        match found {
            Ok(vm) => Ok(vm["id"].as_str().unwrap().to_owned()),
            refused => Err(problem(refused).kind),
        }
    };
    let admin = &server.admin;
    assert_eq!(get(admin, "anna").await.unwrap(), own.id);
    assert_eq!(get(admin, "bert").await, Err(ProblemKind::NotFound));
    assert_eq!(get(admin, "red/anna").await.unwrap(), others.id);
    assert_eq!(get(admin, &others.id).await.unwrap(), others.id);
    let user = server.client("red", Role::User).await;
    assert_eq!(get(&user, "anna").await.unwrap(), others.id);
    assert_eq!(get(&user, "red/anna").await.unwrap(), others.id);
    for hidden in ["root/anna", &own.id] {
        assert_eq!(get(&user, hidden).await, Err(ProblemKind::NotFound));
    }
}

async fn users_see_which_hosts_there_are_and_not_what_they_are(server: Server) {
    let labels = json!({"labels": {"gpu": "yes"}});
    let path = "/v1/hosts/here";
    let changed: Value = server
        .admin
        .send(Method::PATCH, path, &labels)
        .await
        .unwrap();
    assert!(changed["capacity"]["cpus"].as_u64().unwrap() > 0);
    let expected = json!({"name": "here", "state": "ready", "labels": {"gpu": "yes"}});
    for role in [Role::User, Role::Viewer] {
        let client = server.client("red", role).await;
        let one: Value = client.get(path, &()).await.unwrap();
        let all: Value = client.get("/v1/hosts", &()).await.unwrap();
        assert_eq!((one, all), (expected.clone(), json!([expected])));
    }
}

async fn a_stream_of_events_ends_with_the_key_that_opened_it(server: Server) {
    let key = create_key(&server.records, "red", Role::User, None).await;
    let user = Client::new(&server.url, key.secret).unwrap();
    let events = user.events(None).await.unwrap();
    let other = server.client("red", Role::User).await;
    let others = other.events(None).await.unwrap();
    let path = format!("/v1/keys/{}", key.key.id);
    server.admin.plain(Method::DELETE, &path).await.unwrap();
    let soon = std::time::Duration::from_secs(10);
    let ended = tokio::time::timeout(soon, events.count()).await;
    assert!(ended.is_ok(), "the stream goes on");
    let a_moment = std::time::Duration::from_millis(100);
    let goes_on = tokio::time::timeout(a_moment, others.count()).await;
    assert!(goes_on.is_err(), "another key's stream has ended");
}
