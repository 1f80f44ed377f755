//! Keys with limits, and the quotas of tenants.
#![allow(clippy::unwrap_used)]

mod served;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use army_api::client::{Client, ClientError};
use army_api::keys::{CreateKey, Key, KeyScope, Role};
use army_api::templates::Template;
use army_api::tenants::Tenant;
use army_api::vms::{CreatedVms, Vm, VmPage, VmState};
use army_api::{Problem, ProblemKind};
use army_node_api::simulated::SimulatedNode;
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};

use served::{Postgres, Server, on_each_database, record, server_over, template};

const LIMIT: Duration = Duration::from_secs(60);

async fn serve(postgres: Option<Postgres>) -> Server {
    let server = server_over(Arc::new(SimulatedNode::new("here")), postgres).await;
    // The scheduler knows a host that has reported.
    server.controller.recover().await.unwrap();
    let template = Template {
        memory_bytes: 1 << 30,
        vcpus: 2,
        disk_bytes: Some(10 << 30),
        ..template("t")
    };
    server.records.insert_template(&template).await.unwrap();
    server
}

fn problem<T>(result: Result<T, ClientError>) -> Problem {
    match result {
        Err(ClientError::Refused(problem)) => problem,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

async fn client(server: &Server, request: CreateKey) -> Client {
    let key = server.records.create_key(&request).await.unwrap();
    Client::new(&server.url, key.secret).unwrap()
}

async fn create(client: &Client, count: u32) -> Result<CreatedVms, ClientError> {
    let body = json!({"template": "t", "count": count});
    client.send(Method::POST, "/v1/vms", &body).await
}

async fn a_key_has_a_name_an_end_and_a_last_use(postgres: Option<Postgres>) {
    let server = serve(postgres).await;
    let body = json!({"tenant": "red", "role": "user", "name": "laptop of anna", "ttl_s": 3600});
    let made: Value = server
        .admin
        .send(Method::POST, "/v1/keys", &body)
        .await
        .unwrap();
    let client = Client::new(&server.url, made["secret"].as_str().unwrap()).unwrap();
    let key = async || {
        let keys: Vec<Key> = server.admin.get("/v1/keys", &()).await.unwrap();
        keys.into_iter().find(|key| key.tenant == "red").unwrap()
    };
    let unused = key().await;
    assert_eq!(unused.name.as_deref(), Some("laptop of anna"));
    assert_eq!(unused.used_ms, None);
    let lifetime = unused.expires_ms.unwrap() - unused.created_ms;
    assert!((3_600_000..3_610_000).contains(&lifetime), "{lifetime}");
    let _: VmPage = client.get("/v1/vms", &()).await.unwrap();
    let end = Instant::now() + LIMIT;
    let used = loop {
        if let Some(used) = key().await.used_ms {
            break used;
        }
        assert!(Instant::now() < end);
    };
    // Within a minute, it is not written again.
    for _ in 0..20 {
        let _: VmPage = client.get("/v1/vms", &()).await.unwrap();
    }
    assert_eq!(key().await.used_ms, Some(used));
    for wrong in [
        json!({"tenant": "red", "role": "user", "ttl_s": 0}),
        json!({"tenant": "red", "role": "user", "name": "n".repeat(101)}),
        json!({"tenant": "red", "role": "user", "scope": "everything"}),
    ] {
        let refused = server.admin.send::<Value>(Method::POST, "/v1/keys", &wrong);
        let refused = problem(refused.await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{wrong}");
    }
}

async fn an_expired_key_is_unknown_and_ends_what_it_opened(postgres: Option<Postgres>) {
    let server = serve(postgres).await;
    let request = CreateKey {
        ttl_s: Some(2),
        ..CreateKey::new("red", Role::User)
    };
    let client = client(&server, request).await;
    let mut events = Box::pin(client.events(Some(0)).await.unwrap());
    let ended = async { while events.next().await.is_some() {} };
    tokio::time::timeout(LIMIT, ended).await.unwrap();
    let refused = problem(client.get::<VmPage>("/v1/vms", &()).await);
    assert_eq!(refused.kind, ProblemKind::Unauthorized);
    assert!(refused.detail.contains("expired"), "{refused}");
    // Nor can an administrator's key that will expire take the place of the last one.
    let request = CreateKey {
        ttl_s: Some(3600),
        ..CreateKey::new("root", Role::Admin)
    };
    server.records.create_key(&request).await.unwrap();
    let keys: Vec<Key> = server.admin.get("/v1/keys", &()).await.unwrap();
    let lasting = |key: &&Key| key.role == Role::Admin && key.expires_ms.is_none();
    let last = keys.iter().find(lasting).unwrap();
    let path = format!("/v1/keys/{}", last.id);
    let refused = problem(server.admin.plain(Method::DELETE, &path).await);
    assert_eq!(refused.kind, ProblemKind::Conflict);
}

async fn a_scope_restricts_a_key_beside_its_role(postgres: Option<Postgres>) {
    let server = serve(postgres).await;
    let vms = [
        record("000000000001", "a", "red"),
        record("000000000002", "b", "red"),
    ];
    let records = &server.records;
    records.insert_vms(&vms, &BTreeMap::new()).await.unwrap();
    let scoped = async |role, scope| {
        let request = CreateKey {
            scope: Some(scope),
            ..CreateKey::new("red", role)
        };
        client(&server, request).await
    };
    let of_vm = scoped(Role::User, KeyScope::Vm(vms[0].id.clone())).await;
    let vm: Vm = of_vm.get("/v1/vms/a", &()).await.unwrap();
    assert_eq!(vm.id, vms[0].id);
    for path in [
        "/v1/vms/b",
        "/v1/vms",
        "/v1/templates",
        "/v1/events",
        "/metrics",
    ] {
        let refused = problem(of_vm.get::<Value>(path, &()).await);
        assert_eq!(refused.kind, ProblemKind::Forbidden, "{path}");
    }
    let body = json!({});
    let fork = of_vm.send::<Value>(Method::POST, "/v1/vms/a/fork", &body);
    assert_eq!(problem(fork.await).kind, ProblemKind::Forbidden);
    let of_metrics = scoped(Role::Viewer, KeyScope::Metrics).await;
    let url = format!("{}/metrics", server.url);
    let request = reqwest::Client::new()
        .get(url)
        .bearer_auth(of_metrics.key());
    assert_eq!(request.send().await.unwrap().status(), 200);
    for path in ["/v1/vms", "/v1/keys"] {
        let refused = problem(of_metrics.get::<Value>(path, &()).await);
        assert_eq!(refused.kind, ProblemKind::Forbidden, "{path}");
    }
    let of_templates = scoped(Role::User, KeyScope::Templates).await;
    let all: Vec<Template> = of_templates.get("/v1/templates", &()).await.unwrap();
    assert_eq!(all.len(), 1);
    let refused = problem(create(&of_templates, 1).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
}

async fn quotas_change_without_a_new_key_and_hold(postgres: Option<Postgres>) {
    let server = serve(postgres).await;
    let user = client(&server, CreateKey::new("red", Role::User)).await;
    let set = async |body: Value| -> Tenant {
        let changed = server.admin.send(Method::PATCH, "/v1/tenants/red", &body);
        changed.await.unwrap()
    };
    set(json!({"max_memory_bytes": 3_u64 << 30})).await;
    assert_eq!(create(&user, 2).await.unwrap().vms.len(), 2);
    let refused = problem(create(&user, 2).await);
    assert_eq!(refused.kind, ProblemKind::QuotaExceeded);
    assert!(refused.detail.contains("bytes of memory"), "{refused}");
    let tenant = set(json!({"max_memory_bytes": null, "max_vcpus": 5})).await;
    assert_eq!((tenant.used.vms, tenant.used.vcpus), (2, 4));
    assert_eq!(tenant.used.memory_bytes, 2 << 30);
    assert_eq!(tenant.quotas.max_memory_bytes, None);
    let refused = problem(create(&user, 1).await);
    assert!(refused.detail.contains("4 of the 5 CPUs"), "{refused}");
    let tenant = set(json!({"max_vcpus": 6, "max_vms": 3})).await;
    assert_eq!(tenant.quotas.max_vms, Some(3));
    // Many at the same time take no more than there is.
    let all = futures_util::future::join_all((0..8).map(|_| create(&user, 1))).await;
    assert_eq!(all.iter().filter(|created| created.is_ok()).count(), 1);
    let own: Tenant = user.get("/v1/tenants/red", &()).await.unwrap();
    assert_eq!(own.used.vms, 3);
    // Forks count as what they are forks of.
    set(json!({"max_vms": null})).await;
    let vms: VmPage = user.get("/v1/vms", &()).await.unwrap();
    let path = format!("/v1/vms/{}/fork", vms.vms[0].id);
    let refused = problem(
        user.send::<CreatedVms>(Method::POST, &path, &json!({}))
            .await,
    );
    assert_eq!(refused.kind, ProblemKind::QuotaExceeded);
    let refused = problem(user.get::<Tenant>("/v1/tenants/root", &()).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    let refused = problem(user.get::<Vec<Tenant>>("/v1/tenants", &()).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    let body = json!({"max_vms": 1});
    let unknown = server
        .admin
        .send::<Tenant>(Method::PATCH, "/v1/tenants/none", &body);
    assert_eq!(problem(unknown.await).kind, ProblemKind::NotFound);
}

async fn a_suspended_vm_counts_for_no_memory_and_is_resumed_within_the_quota(
    postgres: Option<Postgres>,
) {
    let server = serve(postgres).await;
    let user = client(&server, CreateKey::new("red", Role::User)).await;
    let quota = json!({"max_memory_bytes": 1_u64 << 30});
    let set = server
        .admin
        .send::<Tenant>(Method::PATCH, "/v1/tenants/red", &quota);
    set.await.unwrap();
    let first = create(&user, 1).await.unwrap().vms.remove(0);
    problem(create(&user, 1).await);
    let act = async |vm: &Vm, action: &str| {
        let path = format!("/v1/vms/{}/{action}", vm.id);
        user.send::<Vm>(Method::POST, &path, &json!({})).await
    };
    act(&first, "suspend").await.unwrap();
    let tenant: Tenant = user.get("/v1/tenants/red", &()).await.unwrap();
    assert_eq!((tenant.used.vms, tenant.used.memory_bytes), (1, 0));
    let second = create(&user, 1).await.unwrap().vms.remove(0);
    let refused = problem(act(&first, "resume").await);
    assert_eq!(refused.kind, ProblemKind::QuotaExceeded);
    act(&second, "suspend").await.unwrap();
    assert_eq!(act(&first, "resume").await.unwrap().state, VmState::Running);
}

async fn quotas_of_disk_templates_and_standbys_hold(postgres: Option<Postgres>) {
    let server = serve(postgres).await;
    let user = client(&server, CreateKey::new("red", Role::User)).await;
    let set = async |body: Value| -> Tenant {
        let changed = server.admin.send(Method::PATCH, "/v1/tenants/red", &body);
        changed.await.unwrap()
    };
    // The disks of VMs count by what they may grow to.
    set(json!({"max_disk_bytes": 25_u64 << 30})).await;
    assert_eq!(create(&user, 2).await.unwrap().vms.len(), 2);
    let refused = problem(create(&user, 1).await);
    assert_eq!(refused.kind, ProblemKind::QuotaExceeded);
    assert!(refused.detail.contains("bytes of disk"), "{refused}");
    let tenant = set(json!({"max_disk_bytes": 30_u64 << 30})).await;
    assert_eq!(tenant.used.disk_bytes, 20 << 30);
    let all = futures_util::future::join_all((0..8).map(|_| create(&user, 1))).await;
    assert_eq!(all.iter().filter(|created| created.is_ok()).count(), 1);
    let vms: VmPage = user.get("/v1/vms", &()).await.unwrap();
    let vm = format!("/v1/vms/{}", vms.vms[0].id);
    let (path, body) = (format!("{vm}/fork"), json!({}));
    let fork = user.send::<CreatedVms>(Method::POST, &path, &body);
    assert_eq!(problem(fork.await).kind, ProblemKind::QuotaExceeded);
    // Templates count with those that are being made.
    set(json!({"max_templates": 2})).await;
    let snapshot = async |name: String| -> Result<Template, ClientError> {
        let path = format!("{vm}/snapshot");
        user.send(Method::POST, &path, &json!({ "template": name }))
            .await
    };
    let names = (0..8).map(|number| snapshot(format!("s{number}")));
    let all = futures_util::future::join_all(names).await;
    let made: Vec<Template> = all.into_iter().filter_map(Result::ok).collect();
    assert_eq!(made.len(), 2);
    let refused = problem(snapshot("more".into()).await);
    assert_eq!(refused.kind, ProblemKind::QuotaExceeded);
    assert!(refused.detail.contains("2 of the 2 templates"), "{refused}");
    // Standbys are permitted by an administrator, and count for each host.
    let standbys = async |template: &Template, count: u32| -> Result<Template, ClientError> {
        let path = format!("/v1/templates/{}", template.name);
        user.send(Method::PATCH, &path, &json!({ "standbys": count }))
            .await
    };
    let refused = problem(standbys(&made[0], 1).await);
    assert_eq!(refused.kind, ProblemKind::QuotaExceeded);
    assert!(
        refused.detail.contains("standbys on each host"),
        "{refused}"
    );
    set(json!({"max_standbys": 3})).await;
    let both = tokio::join!(standbys(&made[0], 2), standbys(&made[1], 2));
    assert!(both.0.is_ok() != both.1.is_ok(), "{both:?}");
    let tenant = set(json!({"max_standbys": 1})).await;
    assert_eq!((tenant.used.templates, tenant.used.standbys), (2, 2));
    // Fewer are allowed even where they are still too many.
    let kept = if both.0.is_ok() { &made[0] } else { &made[1] };
    assert_eq!(standbys(kept, 1).await.unwrap().standbys, 1);
    standbys(kept, 0).await.unwrap();
    let path = format!("/v1/templates/{}", kept.name);
    user.plain(Method::DELETE, &path).await.unwrap();
    snapshot("more".into()).await.unwrap();
}

on_each_database! {
    a_key_has_a_name_an_end_and_a_last_use,
    an_expired_key_is_unknown_and_ends_what_it_opened,
    a_scope_restricts_a_key_beside_its_role,
    quotas_change_without_a_new_key_and_hold,
    a_suspended_vm_counts_for_no_memory_and_is_resumed_within_the_quota,
    quotas_of_disk_templates_and_standbys_hold,
}
