//! What becomes of moves: whoever is killed, and whatever is lost, a VM runs on one host.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use army_api::operations::{OperationFilter, OperationState};
use army_api::templates::RegisterTemplate;
use army_api::vms::CreateVms;
use army_node_api::requests::TemplateFacts;
use army_node_api::simulated::{LostWord, SimulatedNode};
use army_node_api::{Deadline, NodeApi};

use super::*;
use crate::testing::Postgres;
use crate::{Database, Node, Operation};

/// A database, and hosts that outlive the controllers of a test.
struct Site {
    url: String,
    hosts: Vec<Arc<SimulatedNode>>,
    _postgres: Option<Postgres>,
    _folder: tempfile::TempDir,
}

impl Site {
    /// A site with SQLite, and one with PostgreSQL where that is installed.
    fn each(hosts: impl Fn() -> Vec<SimulatedNode>) -> Vec<Self> {
        let sqlite = |folder: &Path| Database::sqlite_url(&folder.join("army.db"));
        let mut sites = vec![Self::new(hosts(), None, sqlite)];
        if let Some(postgres) = Postgres::start(Path::new("/tmp"), &["-F"]).unwrap() {
            let url = postgres.create_database("army").unwrap();
            sites.push(Self::new(hosts(), Some(postgres), |_| url));
        }
        sites
    }

    fn new(
        hosts: Vec<SimulatedNode>,
        postgres: Option<Postgres>,
        url: impl FnOnce(&Path) -> String,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let hosts: Vec<_> = hosts.into_iter().map(Arc::new).collect();
        for host in &hosts {
            hosts.iter().for_each(|peer| host.connect(peer));
        }
        Self {
            url: url(folder.path()),
            hosts,
            _postgres: postgres,
            _folder: folder,
        }
    }

    fn nodes(&self) -> Vec<Node> {
        let hosts = self.hosts.iter();
        hosts
            .map(|host| -> Node { Arc::<SimulatedNode>::clone(host) })
            .collect()
    }

    async fn start(&self) -> Arc<Controller> {
        start(&self.url, self.nodes()).await
    }

    /// Starts a controller that has `count` VMs on the first host.
    async fn with_vms(&self, count: u32) -> (Arc<Controller>, Vec<Vm>) {
        let controller = self.start().await;
        let vms = create(&controller, count).await;
        (controller, vms)
    }

    /// The hosts on which a VM runs, is paused or is suspended.
    fn places(&self, vm: &str) -> Vec<&str> {
        let has = |host: &&Arc<SimulatedNode>| host.vm_state(vm).is_some_and(|it| it.is_reported());
        self.hosts
            .iter()
            .filter(has)
            .map(|host| host.name())
            .collect()
    }

    /// Whether a host knows nothing of a VM.
    fn is_clean(&self, host: usize, vm: &str) -> bool {
        self.hosts[host].vm_state(vm).is_none()
    }
}

async fn start(url: &str, nodes: Vec<Node>) -> Arc<Controller> {
    let database = Database::open(url).await.unwrap();
    let controller = Arc::new(Controller::of_simulated(database, nodes).await.unwrap());
    controller.recover().await.unwrap();
    controller
}

/// Creates VMs on the first host, which is the only one that is open meanwhile.
async fn create(controller: &Arc<Controller>, count: u32) -> Vec<Vm> {
    let request = RegisterTemplate {
        name: "t".into(),
        host: Some("a".into()),
        standbys: 0,
    };
    let started = controller.register_template(&requester(), request).await;
    controller.outcome(started.unwrap(), None).await.unwrap();
    let others: Vec<String> = controller
        .nodes()
        .iter()
        .map(|it| it.name().to_owned())
        .collect();
    for host in others.iter().filter(|host| *host != "a") {
        controller.drain(host, true).await.unwrap();
    }
    let details = CreateVms {
        template: "t".into(),
        name: Some("vm".into()),
        count,
        ..CreateVms::default()
    };
    let created = controller.create_and_wait(&requester(), details).await;
    for host in others.iter().filter(|host| *host != "a") {
        controller.drain(host, false).await.unwrap();
    }
    created.unwrap().vms
}

fn requester() -> Requester {
    Requester {
        tenant: "default".into(),
        is_administrator: true,
        key: "k1".into(),
        idempotency_key: None,
    }
}

fn host(name: &str) -> SimulatedNode {
    let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let host = SimulatedNode::new(name).with_address(address);
    if name == "a" {
        host.add_template("t", TemplateFacts::default(), &[]);
    }
    host
}

fn three() -> Vec<SimulatedNode> {
    ["a", "b", "c"].map(host).into()
}

fn two() -> Vec<SimulatedNode> {
    ["a", "b"].map(host).into()
}

/// Two hosts, of which the first one holds VMs that leave it.
fn gated() -> Vec<SimulatedNode> {
    vec![host("a").with_gated_departures(), host("b")]
}

fn to(host: &str) -> MigrateVm {
    MigrateVm {
        to: Some(host.to_owned()),
        bytes_per_second: None,
    }
}

async fn migrate(controller: &Arc<Controller>, vm: &Vm, request: &MigrateVm) -> Result<MovedVm> {
    let vm = controller.store.vm(&vm.id).await?;
    let started = controller.migrate_vm(&requester(), &vm, request).await?;
    match controller.outcome(started, None).await? {
        Some(Output::Moved(moved)) => Ok(*moved),
        other => panic!("{other:?}"),
    }
}

/// Waits until no operation is in progress.
async fn settled(controller: &Controller) -> Vec<Operation> {
    loop {
        let filter = OperationFilter::default();
        let (operations, _) = controller.operations(&filter, None).await.unwrap();
        let is_running = |it: &Operation| it.state == OperationState::Running;
        if !operations.iter().any(is_running) {
            return operations;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn events_of(controller: &Controller, vm: &str) -> Vec<String> {
    let events = controller.store.events_after(0, None).await.unwrap();
    let events = events.into_iter().filter(|event| event.subject == vm);
    events.map(|event| event.kind).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_moves_there_and_back_in_growing_epochs_and_is_told_of() {
    for site in Site::each(two) {
        let (controller, vms) = site.with_vms(1).await;
        let vm = &vms[0];
        let moved = migrate(&controller, vm, &MigrateVm::default())
            .await
            .unwrap();
        assert_eq!(
            (moved.vm.host.as_str(), moved.vm.state),
            ("b", VmState::Running)
        );
        assert_eq!((moved.moved.from.as_str(), moved.moved.pause_us), ("a", 1));
        assert_eq!(site.places(&vm.id), ["b"]);
        assert!(site.is_clean(0, &vm.id));
        assert_eq!(site.hosts[1].vm_epoch(&vm.id), 2);
        // The template came along, and reports change nothing.
        assert_eq!(site.hosts[1].templates(), ["t"]);
        controller.poll_nodes().await.unwrap();
        let back = migrate(&controller, vm, &to("a")).await.unwrap();
        assert_eq!(back.vm.host, "a");
        assert_eq!(site.places(&vm.id), ["a"]);
        assert_eq!(site.hosts[0].vm_epoch(&vm.id), 3);
        let kinds = events_of(&controller, &vm.id).await;
        let moves = kinds.iter().filter(|it| *it == "vm.moved").count();
        assert_eq!(moves, 2, "{kinds:?}");
        let here = migrate(&controller, vm, &to("a")).await.unwrap_err();
        assert_eq!(here.kind, ErrorKind::Conflict);
        let nowhere = migrate(&controller, vm, &to("z")).await.unwrap_err();
        assert_eq!(nowhere.kind, ErrorKind::NotFound);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_and_a_suspended_vm_arrive_as_they_were() {
    for site in Site::each(two) {
        let (controller, vms) = site.with_vms(2).await;
        controller.pause(&vms[0]).await.unwrap();
        controller.suspend(&vms[1]).await.unwrap();
        for (vm, state) in [(&vms[0], VmState::Paused), (&vms[1], VmState::Suspended)] {
            let moved = migrate(&controller, vm, &MigrateVm::default())
                .await
                .unwrap();
            assert_eq!((moved.vm.host.as_str(), moved.vm.state), ("b", state));
            assert_eq!(site.hosts[1].vm_state(&vm.id), Some(state));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_word_is_lost_the_vm_is_on_one_host_and_the_other_is_clean() {
    for site in Site::each(two) {
        let (controller, vms) = site.with_vms(1).await;
        let vm = &vms[0];
        let refusal = army_node_api::Error::new(army_node_api::ErrorKind::Conflict, "not today");
        for (lost, arrives) in [
            (LostWord::Refusal(refusal), false),
            (LostWord::Ready, false),
            (LostWord::Destination, false),
            (LostWord::Go, true),
            (LostWord::Running, true),
            (LostWord::Source, true),
        ] {
            site.hosts[0].lose_in_move(&vm.id, lost.clone());
            let moved = migrate(&controller, vm, &to("b")).await;
            assert_eq!(moved.is_ok(), arrives, "{lost:?}: {moved:?}");
            let (place, other) = if arrives { ("b", 0) } else { ("a", 1) };
            assert_eq!(site.places(&vm.id), [place], "{lost:?}");
            assert!(site.is_clean(other, &vm.id), "{lost:?}");
            let now = controller.store.vm(&vm.id).await.unwrap();
            assert_eq!(
                (now.host.as_str(), now.state),
                (place, VmState::Running),
                "{lost:?}"
            );
            controller.poll_nodes().await.unwrap();
            assert_eq!(controller.store.vm(&vm.id).await.unwrap(), now, "{lost:?}");
            if arrives {
                migrate(&controller, vm, &to("a")).await.unwrap();
            }
        }
        let failed = settled(&controller).await;
        let failed = failed
            .iter()
            .filter(|it| it.state == OperationState::Failed);
        let errors: Vec<_> = failed.filter_map(|it| it.error.as_ref()).collect();
        assert!(
            errors.iter().any(|it| it.message.contains("not today")),
            "{errors:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_turns_out_to_be_unable_is_replaced_by_another() {
    let site = Site::new(three(), None, |folder| {
        Database::sqlite_url(&folder.join("army.db"))
    });
    let (controller, vms) = site.with_vms(1).await;
    let vm = &vms[0];
    let kind = army_node_api::ErrorKind::HostUnsupported;
    let refusal = army_node_api::Error::new(kind, "it lacks avx512f");
    site.hosts[0].lose_in_move(&vm.id, LostWord::Refusal(refusal.clone()));
    let moved = migrate(&controller, vm, &MigrateVm::default())
        .await
        .unwrap();
    assert_eq!(site.places(&vm.id), [moved.vm.host.as_str()]);
    let unable = site
        .hosts
        .iter()
        .position(|it| ![&moved.vm.host, "a"].contains(&it.name()));
    assert!(site.is_clean(unable.unwrap(), &vm.id));
    // Who has named a host gets no other one.
    let back = site
        .hosts
        .iter()
        .position(|it| it.name() == moved.vm.host)
        .unwrap();
    site.hosts[back].lose_in_move(&vm.id, LostWord::Refusal(refusal));
    let refused = migrate(&controller, vm, &to("a")).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::HostUnsupported);
    assert_eq!(site.places(&vm.id), [moved.vm.host.as_str()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_of_the_controller_the_move_is_what_the_hosts_have_made_of_it() {
    for lost in [
        None,
        Some(LostWord::Ready),
        Some(LostWord::Go),
        Some(LostWord::Running),
        Some(LostWord::Source),
        Some(LostWord::Destination),
    ] {
        for site in Site::each(gated) {
            let (url, nodes) = (site.url.clone(), site.nodes());
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            let (sender, vm) = tokio::sync::oneshot::channel();
            runtime.spawn(async move {
                let controller = start(&url, nodes).await;
                let vm = create(&controller, 1).await.remove(0);
                sender.send(vm.clone()).unwrap();
                let _ = migrate(&controller, &vm, &to("b")).await;
            });
            let vm = vm.await.unwrap();
            site.hosts[0].departures.arrival().await;
            let limit = Duration::from_secs(60);
            let end = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(limit));
            end.await.unwrap();
            // The nodes go on meanwhile, and whoever resumes the move may begin it again.
            if let Some(lost) = &lost {
                site.hosts[0].lose_in_move(&vm.id, lost.clone());
            }
            let _ = site.hosts[0].complete_departure(&vm.id);
            site.hosts[0].departures.release();
            if site._postgres.is_some() {
                let database = Database::open(&site.url).await.unwrap();
                database.0.expire_all_leases().await.unwrap();
            }
            let controller = site.start().await;
            let operations = settled(&controller).await;
            let moves = operations
                .iter()
                .find(|it| it.kind == OperationKind::MigrateVm);
            assert_eq!(
                moves.unwrap().state,
                OperationState::Succeeded,
                "{lost:?} {moves:?}"
            );
            assert_eq!(site.places(&vm.id), ["b"], "{lost:?}");
            assert!(site.is_clean(0, &vm.id), "{lost:?}");
            let now = controller.store.vm(&vm.id).await.unwrap();
            assert_eq!(
                (now.host.as_str(), now.state),
                ("b", VmState::Running),
                "{lost:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_whose_host_is_silent_waits_for_it_and_says_so() {
    for site in Site::each(gated) {
        let (controller, vms) = site.with_vms(1).await;
        let vm = &vms[0];
        site.hosts[0].lose_in_move(&vm.id, LostWord::Go);
        let started = controller
            .migrate_vm(&requester(), vm, &to("b"))
            .await
            .unwrap();
        site.hosts[0].departures.arrival().await;
        let moving = controller.store.vm(&vm.id).await.unwrap();
        assert_eq!(
            (moving.host.as_str(), moving.state),
            ("a", VmState::Migrating)
        );
        // Reports of both hosts leave the VM alone, and so does everybody else.
        controller.poll_nodes().await.unwrap();
        assert_eq!(controller.store.vm(&vm.id).await.unwrap(), moving);
        let refused = controller.pause(&moving).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        site.hosts[1].set_unreachable(true);
        site.hosts[0].departures.release();
        let id = started.id.clone();
        let progress = loop {
            let operation = controller
                .operation(&id, None, Duration::ZERO)
                .await
                .unwrap();
            assert_eq!(operation.state, OperationState::Running);
            let progress = operation.progress.unwrap_or_default();
            if progress.starts_with("waits for b") {
                break progress;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert!(progress.contains("does not answer"), "{progress}");
        assert_eq!(site.places(&vm.id), [] as [&str; 0]);
        site.hosts[1].set_unreachable(false);
        controller.outcome(started, None).await.unwrap();
        assert_eq!(site.places(&vm.id), ["b"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_destroyed_while_it_moves_is_nowhere() {
    for site in Site::each(gated) {
        let (controller, vms) = site.with_vms(1).await;
        let vm = &vms[0];
        let started = controller
            .migrate_vm(&requester(), vm, &to("b"))
            .await
            .unwrap();
        site.hosts[0].departures.arrival().await;
        let moving = controller.store.vm(&vm.id).await.unwrap();
        let ended = controller.destroy(&moving).await.unwrap();
        assert_eq!(ended.state, VmState::Ended);
        // The destination runs it, because the word was on its way.
        site.hosts[0].departures.release();
        controller.outcome(started, None).await.unwrap_err();
        for _ in 0..3 {
            controller.poll_nodes().await.unwrap();
        }
        assert_eq!(site.places(&vm.id), [] as [&str; 0]);
        assert!(site.is_clean(0, &vm.id) && site.is_clean(1, &vm.id));
        let now = controller.store.vm(&vm.id).await.unwrap();
        assert_eq!(now.state, VmState::Ended);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_was_not_told_it_learns_after_its_report() {
    for site in Site::each(two) {
        let (controller, vms) = site.with_vms(2).await;
        // The source of a move that has failed does not know that it has the VM.
        let request = SendVmRequest {
            vm: vms[0].id.clone(),
            epoch: 2,
            to: "nobody".into(),
            address: "127.0.0.1:1".parse().unwrap(),
            ticket: "x".repeat(64),
            bytes_per_second: None,
        };
        let limit = Deadline::after(Duration::from_secs(60));
        let node = controller.node("a").unwrap();
        node.send_vm(request, limit.into()).await.unwrap_err();
        assert_eq!(site.hosts[0].vm_state(&vms[0].id), Some(VmState::Migrating));
        controller.poll_nodes().await.unwrap();
        assert_eq!(site.hosts[0].vm_state(&vms[0].id), Some(VmState::Running));
        // The source of one that has succeeded does not know that the VM has left.
        migrate(&controller, &vms[1], &to("b")).await.unwrap();
        site.hosts[0].add_vm(&vms[1].id);
        for _ in 0..3 {
            controller.poll_nodes().await.unwrap();
        }
        assert!(site.is_clean(0, &vms[1].id));
        assert_eq!(site.places(&vms[1].id), ["b"]);
        let now = controller.store.vm(&vms[1].id).await.unwrap();
        assert_eq!((now.host.as_str(), now.state), ("b", VmState::Running));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_connects_to_a_guest_between_two_hosts_waits_for_it() {
    let site = Site::new(gated(), None, |folder| {
        Database::sqlite_url(&folder.join("army.db"))
    });
    let (controller, vms) = site.with_vms(1).await;
    let started = controller
        .migrate_vm(&requester(), &vms[0], &to("b"))
        .await
        .unwrap();
    site.hosts[0].departures.arrival().await;
    let connecting = {
        let (controller, vm) = (Arc::clone(&controller), vms[0].clone());
        tokio::spawn(async move {
            controller
                .agent(&vm, Duration::from_secs(60))
                .await
                .map(drop)
        })
    };
    // No agent answers at the source.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!connecting.is_finished());
    let (near, mut agent) = tokio::net::UnixStream::pair().unwrap();
    let mut greeting = Vec::new();
    let hello = agent_proto::messages::FromAgent {
        kind: Some(agent_proto::messages::from_agent::Kind::Hello(
            agent_proto::messages::Hello::default(),
        )),
    };
    agent_proto::frame::encode(&hello, &mut greeting).unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut agent, &greeting)
        .await
        .unwrap();
    site.hosts[1].add_agent(near);
    site.hosts[0].departures.release();
    controller.outcome(started, None).await.unwrap();
    connecting.await.unwrap().unwrap();
}

async fn evacuate(controller: &Arc<Controller>, host: &str) -> Result<Option<Output>> {
    let started = controller.evacuate_host(&requester(), host).await?;
    controller.outcome(started, None).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evacuated_host_has_no_vms_and_takes_none() {
    for site in Site::each(three) {
        let (controller, vms) = site.with_vms(7).await;
        controller.suspend(&vms[3]).await.unwrap();
        let Some(Output::Host(host)) = evacuate(&controller, "a").await.unwrap() else {
            panic!("no host");
        };
        assert_eq!(host.vms, Some(0));
        assert_eq!(host.state, army_api::hosts::HostState::Draining);
        for vm in &vms {
            let now = controller.store.vm(&vm.id).await.unwrap();
            assert_eq!(site.places(&vm.id), [now.host.as_str()]);
            assert_ne!(now.host, "a");
        }
        assert_eq!(site.hosts[0].vms(), [] as [String; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evacuation_names_what_stays_and_moves_the_rest() {
    for site in Site::each(two) {
        let (controller, vms) = site.with_vms(3).await;
        let request = army_api::checkpoints::TakeCheckpoint { name: "c".into() };
        controller.checkpoint(&vms[1], request).await.unwrap();
        let error = evacuate(&controller, "a").await.unwrap_err();
        assert!(
            error.message.contains("1 VMs stay on a, and 2 were moved"),
            "{error}"
        );
        assert!(error.message.contains(&vms[1].name), "{error}");
        assert!(error.message.contains("checkpoints"), "{error}");
        assert_eq!(site.places(&vms[1].id), ["a"]);
        assert_eq!(site.places(&vms[0].id), ["b"]);
        site.hosts[0].set_unreachable(true);
        let unknown = evacuate(&controller, "z").await.unwrap_err();
        assert_eq!(unknown.kind, ErrorKind::NotFound);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evacuation_that_a_kill_interrupts_is_continued() {
    let site = Site::new(gated(), None, |folder| {
        Database::sqlite_url(&folder.join("army.db"))
    });
    let (url, nodes) = (site.url.clone(), site.nodes());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.spawn(async move {
        let controller = start(&url, nodes).await;
        create(&controller, 5).await;
        let _ = evacuate(&controller, "a").await;
    });
    for _ in 0..permits::MOVES {
        site.hosts[0].departures.arrival().await;
    }
    let limit = Duration::from_secs(60);
    let end = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(limit));
    end.await.unwrap();
    for vm in site.hosts[0].vms() {
        let _ = site.hosts[0].complete_departure(&vm);
    }
    for _ in 0..20 {
        site.hosts[0].departures.release();
    }
    let controller = site.start().await;
    let operations = settled(&controller).await;
    let evacuation = operations
        .iter()
        .find(|it| it.kind == OperationKind::EvacuateHost);
    assert_eq!(
        evacuation.unwrap().state,
        OperationState::Succeeded,
        "{evacuation:?}"
    );
    assert_eq!(site.hosts[0].vms(), [] as [String; 0]);
    assert_eq!(site.hosts[1].running_vms().len(), 5);
}
