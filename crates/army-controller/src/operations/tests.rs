//! What becomes of operations: repeated requests, clients that go away, and controllers that end in
//! the middle.

use army_api::templates::{RegisterTemplate, TemplateState};
use army_api::vms::{CreateVms, SnapshotVm, Vm, VmState};
use army_node_api::requests::TemplateFacts;
use army_node_api::simulated::SimulatedNode;

use super::*;
use crate::{Database, Node};

/// A database, and hosts that outlive the controllers of a test.
struct Site {
    dir: tempfile::TempDir,
    hosts: Vec<Arc<SimulatedNode>>,
}

impl Site {
    fn of(hosts: Vec<SimulatedNode>) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            hosts: hosts.into_iter().map(Arc::new).collect(),
        }
    }

    /// Starts a controller, and has it take over what others have left.
    async fn start(&self) -> Arc<Controller> {
        let url = Database::sqlite_url(&self.dir.path().join("army.db"));
        let database = Database::open(&url).await.unwrap();
        let nodes = self
            .hosts
            .iter()
            .map(|host| -> Node { Arc::<SimulatedNode>::clone(host) });
        let controller = Arc::new(Controller::of_simulated(database, nodes).await.unwrap());
        controller.recover().await.unwrap();
        controller
    }

    /// Runs `work` with a controller until `moment` has come, and then kills the controller with all
    /// of its tasks.
    async fn kill_at<F>(
        &self,
        work: impl FnOnce(Arc<Controller>) -> F,
        moment: impl Future<Output = ()>,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let url = Database::sqlite_url(&self.dir.path().join("army.db"));
        let nodes: Vec<Node> = self
            .hosts
            .iter()
            .map(|host| Arc::<SimulatedNode>::clone(host) as Node)
            .collect();
        let opened = runtime.spawn(async move {
            let database = Database::open(&url).await.unwrap();
            let controller = Arc::new(Controller::of_simulated(database, nodes).await.unwrap());
            controller.recover().await.unwrap();
            controller
        });
        let controller = opened.await.unwrap();
        runtime.spawn(work(controller));
        moment.await;
        // Nothing of it is left when this returns.
        let limit = Duration::from_secs(60);
        let end = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(limit));
        end.await.unwrap();
    }
}

fn requester(idempotency_key: Option<&str>) -> Requester {
    Requester {
        tenant: "default".into(),
        is_administrator: true,
        key: "k1".into(),
        idempotency_key: idempotency_key.map(str::to_owned),
    }
}

fn vms(count: u32) -> CreateVms {
    CreateVms {
        template: "t".into(),
        name: Some("vm".into()),
        count,
        ..CreateVms::default()
    }
}

/// Registers the template `t`, which the first host has.
async fn register(controller: &Arc<Controller>) {
    let host = controller.nodes()[0].name().to_owned();
    let request = RegisterTemplate {
        name: "t".into(),
        host: Some(host),
        standbys: 0,
    };
    let started = controller
        .register_template(&requester(None), request)
        .await
        .unwrap();
    controller.outcome(started, None).await.unwrap();
}

fn host(name: &str) -> SimulatedNode {
    let host = SimulatedNode::new(name);
    host.add_template("t", TemplateFacts::default(), &[]);
    host
}

async fn create(
    controller: &Arc<Controller>,
    key: Option<&str>,
    details: CreateVms,
) -> Result<CreatedVms> {
    controller.create_and_wait(&requester(key), details).await
}

async fn all(controller: &Controller) -> Vec<Operation> {
    let filter = OperationFilter::default();
    controller.operations(&filter, None).await.unwrap().0
}

/// Waits until no operation is in progress.
async fn settled(controller: &Controller) -> Vec<Operation> {
    loop {
        let operations = all(controller).await;
        if operations
            .iter()
            .all(|it| it.state != OperationState::Running)
        {
            return operations;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repetition_gets_the_vms_of_the_operation_as_they_are_now() {
    let site = Site::of(vec![host("a")]);
    let controller = site.start().await;
    register(&controller).await;
    let first = create(&controller, Some("x"), vms(2)).await.unwrap();
    let again = create(&controller, Some("x"), vms(2)).await.unwrap();
    assert_eq!(first.vms, again.vms);
    assert_eq!(site.hosts[0].requested_vms(), 2);
    controller.destroy(&first.vms[0]).await.unwrap();
    let again = create(&controller, Some("x"), vms(2)).await.unwrap();
    assert_eq!(again.vms[0].state, VmState::Ended);
    assert_eq!(again.vms[1].state, VmState::Running);
    let other = create(&controller, Some("x"), vms(1)).await.unwrap_err();
    assert_eq!(other.kind, ErrorKind::IdempotencyMismatch);
    // The key of another tenant is another key.
    let elsewhere = Requester {
        tenant: "other".into(),
        ..requester(Some("x"))
    };
    let theirs = controller
        .create_and_wait(&elsewhere, vms(1))
        .await
        .unwrap();
    assert_ne!(theirs.vms[0].id, first.vms[1].id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repetition_waits_for_the_operation_in_progress() {
    let site = Site::of(vec![SimulatedNode::new("a").gated()]);
    site.hosts[0].add_template("t", TemplateFacts::default(), &[]);
    site.hosts[0].reports.release();
    let controller = site.start().await;
    register(&controller).await;
    let request = |controller: Arc<Controller>| {
        tokio::spawn(async move { create(&controller, Some("x"), vms(1)).await })
    };
    let first = request(Arc::clone(&controller));
    site.hosts[0].creations.arrival().await;
    let second = request(Arc::clone(&controller));
    let third = controller.create(&requester(Some("x")), vms(1)).await;
    let soon = Some(Duration::from_millis(20));
    let waited = controller.outcome(third.unwrap(), soon).await.unwrap();
    assert!(waited.is_none(), "{waited:?}");
    site.hosts[0].creations.release();
    let (first, second) = (first.await.unwrap(), second.await.unwrap());
    assert_eq!(first.unwrap().vms[0].id, second.unwrap().vms[0].id);
    assert_eq!(site.hosts[0].requested_vms(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_made_nothing_is_tried_again_under_the_same_key() {
    let error = army_node_api::Error::new(army_node_api::ErrorKind::Conflict, "not today");
    let bad = SimulatedNode::new("a").with_creation(Err(error));
    bad.add_template("t", TemplateFacts::default(), &[]);
    let mut site = Site::of(vec![bad]);
    let controller = site.start().await;
    register(&controller).await;
    let refused = create(&controller, Some("x"), vms(2)).await.unwrap_err();
    assert!(refused.message.contains("none of the 2 VMs"), "{refused}");
    let operations = settled(&controller).await;
    assert_eq!(operations[0].state, OperationState::Failed);
    drop(controller);
    // The host can create VMs now.
    site.hosts = vec![Arc::new(host("a"))];
    let controller = site.start().await;
    let created = create(&controller, Some("x"), vms(2)).await.unwrap();
    assert_eq!(created.vms.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_goes_on_when_nobody_waits_for_it() {
    let site = Site::of(vec![SimulatedNode::new("a").gated()]);
    site.hosts[0].add_template("t", TemplateFacts::default(), &[]);
    site.hosts[0].reports.release();
    let controller = site.start().await;
    register(&controller).await;
    let client = {
        let controller = Arc::clone(&controller);
        tokio::spawn(async move { create(&controller, None, vms(1)).await })
    };
    site.hosts[0].creations.arrival().await;
    client.abort();
    let running = all(&controller).await;
    let running = running
        .iter()
        .find(|it| it.kind == OperationKind::CreateVms);
    let running = running.unwrap();
    assert_eq!(running.state, OperationState::Running);
    site.hosts[0].creations.release();
    let limit = Duration::from_secs(60);
    let ended = controller
        .operation(&running.id, None, limit)
        .await
        .unwrap();
    assert_eq!(ended.state, OperationState::Succeeded);
    let Some(Output::Vms(created)) = ended.output else {
        panic!("{ended:?}");
    };
    assert_eq!(created.vms[0].state, VmState::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_are_listed_in_pages_to_their_tenant_alone() {
    let site = Site::of(vec![host("a")]);
    let controller = site.start().await;
    register(&controller).await;
    for number in 0..5 {
        let name = Some(format!("vm{number}"));
        let details = CreateVms { name, ..vms(1) };
        create(&controller, None, details).await.unwrap();
    }
    let mut filter = OperationFilter {
        kind: Some(OperationKind::CreateVms),
        state: Some(OperationState::Succeeded),
        limit: Some(2),
        ..OperationFilter::default()
    };
    let mut ids = Vec::new();
    loop {
        let page = controller.operations(&filter, Some("default")).await;
        let (operations, next) = page.unwrap();
        ids.extend(operations.into_iter().map(|it| it.id));
        filter.after = next;
        if filter.after.is_none() {
            break;
        }
    }
    assert_eq!(ids.len(), 5);
    let (theirs, _) = controller
        .operations(&OperationFilter::default(), Some("other"))
        .await
        .unwrap();
    assert!(theirs.is_empty());
    let hidden = controller.operation(&ids[0], Some("other"), Duration::ZERO);
    assert_eq!(hidden.await.unwrap_err().kind, ErrorKind::NotFound);
}

/// Kills the controller while the hosts create two VMs.
async fn kill_in_creation(site: &Site) {
    let work = |controller: Arc<Controller>| async move {
        register(&controller).await;
        let _ = create(&controller, Some("x"), vms(2)).await;
    };
    let host = Arc::clone(&site.hosts[0]);
    site.hosts[0].reports.release();
    let moment = async move { host.creations.arrival().await };
    site.kill_at(work, moment).await;
}

async fn recorded(controller: &Controller) -> Vec<Vm> {
    let filter = army_api::vms::VmFilter {
        all: true,
        ..army_api::vms::VmFilter::default()
    };
    controller.store.vms(&filter, None).await.unwrap().vms
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_the_vms_that_the_host_has_are_the_answer() {
    let mut site = Site::of(vec![SimulatedNode::new("a").gated()]);
    site.hosts[0].add_template("t", TemplateFacts::default(), &[]);
    kill_in_creation(&site).await;
    // The host has created one of them, and lost the other request.
    let restarted = host("a");
    site.hosts = vec![Arc::new(restarted)];
    let url = Database::sqlite_url(&site.dir.path().join("army.db"));
    let store = Database::open(&url).await.unwrap().0;
    let filter = army_api::vms::VmFilter::default();
    let placed = store.vms(&filter, None).await.unwrap().vms;
    assert_eq!(placed.len(), 2);
    site.hosts[0].add_vm(&placed[0].id);
    drop(store);
    let controller = site.start().await;
    // Later reports decide about VMs that may still have been on their way.
    let reports = tokio::spawn(Arc::clone(&controller).reconcile());
    let created = create(&controller, Some("x"), vms(2)).await.unwrap();
    assert_eq!(created.vms.len(), 1);
    reports.abort();
    assert_eq!(created.vms[0].id, placed[0].id);
    assert_eq!(created.failures.len(), 1);
    assert_eq!(created.failures[0].name, placed[1].name);
    assert_eq!(site.hosts[0].requested_vms(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_a_create_of_which_nothing_is_there_is_tried_again() {
    let mut site = Site::of(vec![SimulatedNode::new("a").gated()]);
    site.hosts[0].add_template("t", TemplateFacts::default(), &[]);
    kill_in_creation(&site).await;
    site.hosts = vec![Arc::new(host("a"))];
    let controller = site.start().await;
    let reports = tokio::spawn(Arc::clone(&controller).reconcile());
    settled(&controller).await;
    let created = create(&controller, Some("x"), vms(2)).await.unwrap();
    assert_eq!((created.vms.len(), created.failures.len()), (2, 0));
    reports.abort();
    let all = recorded(&controller).await;
    let failed = all.iter().filter(|vm| vm.state == VmState::Failed);
    assert_eq!((all.len(), failed.count()), (4, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_a_snapshot_that_the_host_has_whole_is_registered() {
    let site = Site::of(vec![host("a").with_gated_transfers()]);
    let work = |controller: Arc<Controller>| async move {
        register(&controller).await;
        let vm = create(&controller, None, vms(1))
            .await
            .unwrap()
            .vms
            .remove(0);
        let request = SnapshotVm {
            template: "new".into(),
            diff: false,
        };
        let user = Requester {
            is_administrator: false,
            ..requester(Some("s"))
        };
        let started = controller.snapshot(&user, &vm, request).await.unwrap();
        let _ = controller.outcome(started, None).await;
    };
    let node = Arc::clone(&site.hosts[0]);
    site.kill_at(work, async move { node.transfers.arrival().await })
        .await;
    let controller = site.start().await;
    let operations = settled(&controller).await;
    let snapshot = operations
        .iter()
        .find(|it| it.kind == OperationKind::SnapshotVm);
    assert_eq!(snapshot.unwrap().state, OperationState::Succeeded);
    // It belongs to the tenant that has asked for it, and hosts have it by another name.
    let template = controller.template(&requester(None), "default/new").await;
    let template = template.unwrap();
    assert_eq!(template.host, "a");
    assert_eq!(template.full_name(), "default/new");
    let on_host = site.hosts[0].templates();
    assert!(
        on_host.contains(&template.stored_as().to_owned()),
        "{on_host:?}"
    );
    assert_ne!(template.stored_as(), "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_a_template_that_the_host_does_not_have_leaves_its_name_free() {
    let mut site = Site::of(vec![host("a").with_gated_transfers()]);
    let (begun, moment) = tokio::sync::oneshot::channel();
    let work = |controller: Arc<Controller>| async move {
        // Nothing more comes of the content.
        let (_sender, content) = army_node_api::chunks::channel();
        let started = controller
            .import_template(&requester(None), "new", None, content)
            .await
            .unwrap();
        begun.send(()).unwrap();
        let _ = controller.outcome(started, None).await;
    };
    site.kill_at(work, async { moment.await.unwrap() }).await;
    site.hosts = vec![Arc::new(host("a"))];
    let controller = site.start().await;
    let operations = settled(&controller).await;
    assert_eq!(operations[0].kind, OperationKind::ImportTemplate);
    assert_eq!(operations[0].state, OperationState::Failed);
    controller
        .tag(&requester(None), "new", "t")
        .await
        .unwrap_err();
    register(&controller).await;
    controller.tag(&requester(None), "new", "t").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_a_kill_interrupts_is_made_again() {
    let address = "127.0.0.1:1".parse().unwrap();
    let site = Site::of(vec![
        host("a").with_address(address),
        SimulatedNode::new("b")
            .with_address(address)
            .with_gated_transfers(),
    ]);
    let work = |controller: Arc<Controller>| async move {
        register(&controller).await;
        let started = controller.copy_template(&requester(None), "t", "b").await;
        let _ = controller.outcome(started.unwrap(), None).await;
    };
    let node = Arc::clone(&site.hosts[1]);
    site.kill_at(work, async move { node.transfers.arrival().await })
        .await;
    site.hosts[1].transfers.release();
    let controller = site.start().await;
    settled(&controller).await;
    let template = controller.stored_template("t").await.unwrap();
    assert_eq!(template.hosts, ["a", "b"]);
}

/// Removes `t`, and waits for at most `limit`.
async fn remove(controller: &Arc<Controller>, limit: Duration) -> Result<Option<Output>> {
    let started = controller.remove_template(&requester(None), "t").await?;
    controller.outcome(started, Some(limit)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_in_removal_takes_no_vms_and_goes_when_its_last_host_is_back() {
    let address = "127.0.0.1:1".parse().unwrap();
    let site = Site::of(vec![
        host("a").with_address(address),
        SimulatedNode::new("b").with_address(address),
    ]);
    let controller = site.start().await;
    register(&controller).await;
    let started = controller.copy_template(&requester(None), "t", "b").await;
    controller.outcome(started.unwrap(), None).await.unwrap();
    site.hosts[1].set_unreachable(true);
    let soon = Duration::from_millis(100);
    assert!(remove(&controller, soon).await.unwrap().is_none());
    let removing = controller.stored_template("t").await.unwrap();
    assert_eq!(removing.state, TemplateState::Removing);
    for refused in [
        create(&controller, None, vms(1)).await.map(drop),
        controller.tag(&requester(None), "x", "t").await.map(drop),
        controller
            .copy_template(&requester(None), "t", "a")
            .await
            .map(drop),
    ] {
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        assert!(refused.message.contains("being removed"), "{refused}");
    }
    // Who asks again waits for the same operation.
    assert!(remove(&controller, soon).await.unwrap().is_none());
    let removals = all(&controller).await.into_iter();
    let removals = removals.filter(|it| it.kind == OperationKind::RemoveTemplate);
    assert_eq!(removals.count(), 1);
    assert!(site.hosts[0].templates().is_empty());
    site.hosts[1].set_unreachable(false);
    let ended = remove(&controller, Duration::from_secs(60)).await.unwrap();
    assert!(matches!(ended, Some(Output::Nothing)), "{ended:?}");
    assert!(site.hosts[1].templates().is_empty());
    let gone = controller.stored_template("t").await.unwrap_err();
    assert_eq!(gone.kind, ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_a_kill_interrupts_is_continued() {
    let site = Site::of(vec![host("a").with_gated_transfers()]);
    let work = |controller: Arc<Controller>| async move {
        register(&controller).await;
        let _ = remove(&controller, Duration::from_secs(60)).await;
    };
    let node = Arc::clone(&site.hosts[0]);
    site.kill_at(work, async move { node.transfers.arrival().await })
        .await;
    site.hosts[0].transfers.release();
    let controller = site.start().await;
    let operations = settled(&controller).await;
    assert!(
        operations
            .iter()
            .all(|it| it.state == OperationState::Succeeded)
    );
    let gone = controller.stored_template("t").await.unwrap_err();
    assert_eq!(gone.kind, ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_create_and_a_removal_at_once_one_is_refused() {
    for _ in 0..10 {
        let site = Site::of(vec![host("a")]);
        let controller = site.start().await;
        register(&controller).await;
        let (created, removed) = tokio::join!(
            create(&controller, None, vms(1)),
            remove(&controller, Duration::from_secs(60))
        );
        assert_ne!(created.is_ok(), removed.is_ok(), "{created:?} {removed:?}");
        assert_eq!(
            controller.stored_template("t").await.is_ok(),
            created.is_ok()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_made_once_and_a_repetition_says_which() {
    let site = Site::of(vec![host("a")]);
    let controller = site.start().await;
    let request = army_api::keys::CreateKey::new("red", army_api::keys::Role::User);
    let create = || async {
        let requester = requester(Some("x"));
        controller.create_requested_key(&requester, &request).await
    };
    let made = create().await.unwrap();
    let refused = create().await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Conflict);
    assert!(refused.message.contains(&made.key.id), "{refused}");
    assert_eq!(controller.keys().await.unwrap().len(), 1);
}
