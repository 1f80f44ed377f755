//! What happens while a host is being polled.

use army_api::templates::Template;
use army_api::vms::{CreateVms, Vm};
use army_node_api::NodeApi;
use army_node_api::simulated::SimulatedNode;
use std::sync::Arc;

use super::*;
use crate::{Database, Node, Requester};

/// A controller of one host, on which there is a template `t`.
async fn controller() -> (tempfile::TempDir, Arc<Controller>, Arc<SimulatedNode>) {
    let dir = tempfile::tempdir().unwrap();
    let url = Database::sqlite_url(&dir.path().join("army.db"));
    let database = Database::open(&url).await.unwrap();
    let host = Arc::new(SimulatedNode::new("here").gated());
    let node: Node = Arc::<SimulatedNode>::clone(&host);
    let controller = Arc::new(Controller::of_one_host(database, node));
    controller.take_hosts().await.unwrap();
    host.reports.release();
    controller.poll_nodes().await.unwrap();
    host.reports.arrival().await;
    let template = Template {
        name: "t".into(),
        host: "here".into(),
        hosts: vec!["here".into()],
        ..Template::default()
    };
    controller
        .store
        .insert_template(&template, None)
        .await
        .unwrap();
    (dir, controller, host)
}

fn requester() -> Requester {
    Requester {
        tenant: "default".to_owned(),
        ..Requester::default()
    }
}

async fn create(controller: &Arc<Controller>) -> Vm {
    let request = CreateVms {
        template: "t".to_owned(),
        count: 1,
        ..CreateVms::default()
    };
    let created = controller.create_and_wait(&requester(), request).await;
    created.unwrap().vms.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_created_or_destroyed_while_its_host_is_polled_is_not_lost() {
    let (_dir, controller, host) = controller().await;
    let poll = || {
        let controller = Arc::clone(&controller);
        tokio::spawn(async move { controller.poll_nodes().await.unwrap() })
    };
    let creation = {
        let controller = Arc::clone(&controller);
        tokio::spawn(async move { create(&controller).await })
    };
    host.creations.arrival().await;
    // The report has no VMs, since the creation has not finished.
    let polled = poll();
    host.reports.arrival().await;
    host.creations.release();
    let id = creation.await.unwrap().id;
    let vm = async || -> Vm { controller.store.vm(&id).await.unwrap() };
    host.reports.release();
    polled.await.unwrap();
    assert_eq!(vm().await.state, VmState::Running, "{:?}", vm().await);

    // The host does not know the VM, whose deletion is requested while it is polled.
    host.lose_vms();
    let polled = poll();
    host.reports.arrival().await;
    controller.store.request_deletion(&id).await.unwrap();
    host.reports.release();
    polled.await.unwrap();
    assert_eq!(vm().await.state, VmState::Running, "{:?}", vm().await);

    let polled = poll();
    host.reports.arrival().await;
    host.reports.release();
    polled.await.unwrap();
    assert_eq!(vm().await.state, VmState::Ended);
    assert_eq!(vm().await.reason.as_deref(), Some("destroyed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_its_host_does_not_know_any_more_is_lost() {
    let (_dir, controller, host) = controller().await;
    host.creations.release();
    let id = create(&controller).await.id;
    host.lose_vms();
    host.reports.release();
    controller.poll_nodes().await.unwrap();
    let vm = controller.store.vm(&id).await.unwrap();
    assert_eq!(vm.state, VmState::Failed);
    assert!(vm.reason.unwrap().contains("does not know the VM"));
}

/// What happens to a VM that is reported, for tests that need no gates.
struct Fleet {
    controller: Arc<Controller>,
    nodes: Vec<Arc<SimulatedNode>>,
    _dir: tempfile::TempDir,
}

impl Fleet {
    /// A controller of so many hosts, all of which have the template `t`.
    async fn of(count: usize) -> Self {
        // In memory: what is written through to a disk takes most of the time of such a test.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let url = Database::sqlite_url(&dir.path().join("army.db"));
        let database = Database::open(&url).await.unwrap();
        let host = |number| Arc::new(SimulatedNode::new(&format!("host-{number}")));
        let nodes: Vec<_> = (0..count).map(host).collect();
        let of_contract = nodes
            .iter()
            .map(|node| -> Node { Arc::<SimulatedNode>::clone(node) });
        let controller = Controller::of_simulated(database, of_contract).await;
        let controller = Arc::new(controller.unwrap());
        controller.recover().await.unwrap();
        let template = Template {
            name: "t".into(),
            host: "host-0".into(),
            ..Template::default()
        };
        controller
            .store
            .insert_template(&template, None)
            .await
            .unwrap();
        for node in &nodes {
            controller
                .store
                .insert_copy("t", node.name())
                .await
                .unwrap();
        }
        Self {
            controller,
            nodes,
            _dir: dir,
        }
    }

    /// Creates VMs until there is one on each host. Returns one of each, in the hosts' order.
    async fn vm_on_each(&self) -> Vec<Vm> {
        let mut vms: Vec<Option<Vm>> = vec![None; self.nodes.len()];
        while vms.iter().any(Option::is_none) {
            let vm = create(&self.controller).await;
            let index = self.nodes.iter().position(|node| node.name() == vm.host);
            vms[index.unwrap()] = Some(vm);
        }
        vms.into_iter().flatten().collect()
    }

    async fn wait(&self, what: &str, mut done: impl AsyncFnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !done().await {
            assert!(Instant::now() < end, "waited too long: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn state(&self, vm: &Vm) -> VmState {
        self.controller.store.vm(&vm.id).await.unwrap().state
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_end_hangs_or_fails_delays_neither_others_nor_reports() {
    let fleet = Fleet::of(1).await;
    let mut vms = Vec::new();
    for _ in 0..6 {
        vms.push(create(&fleet.controller).await);
    }
    let host = &fleet.nodes[0];
    let failure = army_node_api::Error::new(army_node_api::ErrorKind::Internal, "it is stuck");
    host.refuse_to_destroy(&vms[0].id, None);
    host.refuse_to_destroy(&vms[1].id, Some(failure));
    for vm in &vms[..5] {
        fleet
            .controller
            .store
            .request_deletion(&vm.id)
            .await
            .unwrap();
    }
    let tasks = tokio::spawn(Arc::clone(&fleet.controller).reconcile());
    let before = host.reports_made();
    fleet
        .wait("the others end, and the host reports", async || {
            let mut ended = true;
            for vm in &vms[2..5] {
                ended &= fleet.state(vm).await == VmState::Ended;
            }
            ended && host.reports_made() > before + 3
        })
        .await;
    for vm in [&vms[0], &vms[1], &vms[5]] {
        assert_eq!(fleet.state(vm).await, VmState::Running);
    }
    tasks.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_never_answers_delays_no_other_host() {
    let fleet = Fleet::of(3).await;
    let vms = fleet.vm_on_each().await;
    fleet.nodes[0].freeze(true);
    let tasks = tokio::spawn(Arc::clone(&fleet.controller).reconcile());
    // Requests for VMs of the others, and their own reports, go on while the first is being asked.
    let before = fleet.nodes[1].reports_made();
    for vm in &vms[1..] {
        fleet.controller.pause(vm).await.unwrap();
        fleet.controller.destroy(vm).await.unwrap();
    }
    fleet
        .wait("the others report", async || {
            fleet.nodes[1].reports_made() > before + 3
        })
        .await;
    fleet
        .wait("what has ended is forgotten", async || {
            fleet.nodes[1..].iter().all(|it| it.vms().len() < 3)
        })
        .await;
    assert_eq!(fleet.state(&vms[0]).await, VmState::Running);
    tasks.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn standbys_are_kept_again_after_a_restart_of_the_node() {
    let fleet = Fleet::of(2).await;
    fleet.controller.set_standbys("t", 3).await.unwrap();
    let kept = || fleet.nodes.iter().map(|it| it.standbys("t"));
    assert!(kept().all(|count| count == Some(3)));
    fleet.nodes[1].forget_standbys();
    let tasks = tokio::spawn(Arc::clone(&fleet.controller).reconcile());
    fleet
        .wait("standbys are kept again", async || {
            kept().all(|count| count == Some(3))
        })
        .await;
    fleet.controller.set_standbys("t", 0).await.unwrap();
    assert!(kept().all(|count| count.is_none()));
    tasks.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_changes_nothing_writes_nothing() {
    let fleet = Fleet::of(2).await;
    fleet.vm_on_each().await;
    fleet.controller.poll_nodes().await.unwrap();
    let before = fleet.controller.store.changes();
    let (ids, reported) = (fleet.nodes[0].vms(), fleet.nodes[0].reports_made());
    for _ in 0..5 {
        fleet.controller.poll_nodes().await.unwrap();
    }
    assert!(!ids.is_empty() && fleet.nodes[0].reports_made() == reported + 5);
    // Transactions without a change are none either.
    assert_eq!(fleet.controller.store.changes(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_record_of_an_ended_vm_has_no_secrets_and_is_removed_in_the_end() {
    let fleet = Fleet::of(1).await;
    let request = CreateVms {
        template: "t".to_owned(),
        count: 3,
        environment: [("PASSWORD".to_owned(), "secret".to_owned())].into(),
        ..CreateVms::default()
    };
    let created = fleet
        .controller
        .create_and_wait(&requester(), request)
        .await;
    let vms = created.unwrap().vms;
    let environment = async |vm: &Vm| fleet.controller.store.environment(&vm.id).await.unwrap();
    assert_eq!(environment(&vms[0]).await["PASSWORD"], "secret");
    // One is destroyed, one ends by itself, and one runs.
    fleet.controller.destroy(&vms[0]).await.unwrap();
    fleet.nodes[0].end_vm(&vms[1].id);
    fleet.controller.poll_nodes().await.unwrap();
    assert_eq!(fleet.state(&vms[1]).await, VmState::Ended);
    for vm in &vms[..2] {
        assert!(environment(vm).await.is_empty());
    }
    assert_eq!(environment(&vms[2]).await.len(), 1);
    // What ended a moment ago is kept, and what ended before is not.
    fleet.controller.purge_once().await.unwrap();
    fleet.state(&vms[0]).await;
    let later = army_node_api::time::now_ms() + 1000;
    // The last change is kept, so that later ones have greater numbers.
    create(&fleet.controller).await;
    while fleet.controller.store.purge_ended(later).await.unwrap() > 0 {}
    for vm in &vms[..2] {
        assert!(fleet.controller.store.vm(&vm.id).await.is_err());
    }
    assert_eq!(fleet.state(&vms[2]).await, VmState::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_ten_thousand_vms_that_were_created_and_ended() {
    const VMS: usize = 10_000;
    const AT_ONCE: u32 = 100;
    let fleet = Fleet::of(4).await;
    let tasks = tokio::spawn(Arc::clone(&fleet.controller).reconcile());
    let open_files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let mut first = None;
    for _ in 0..VMS / AT_ONCE as usize {
        let request = CreateVms {
            template: "t".to_owned(),
            count: AT_ONCE,
            ..CreateVms::default()
        };
        let created = fleet
            .controller
            .create_and_wait(&requester(), request)
            .await;
        for vm in created.unwrap().vms {
            fleet.controller.destroy(&vm).await.unwrap();
        }
        first.get_or_insert_with(|| (open_files(), threads()));
    }
    fleet
        .wait("the hosts have forgotten all", async || {
            fleet.nodes.iter().all(|it| it.vms().is_empty())
        })
        .await;
    let store = &fleet.controller.store;
    fleet.controller.mirror.refresh_now(store).await.unwrap();
    assert_eq!(fleet.controller.mirror.len(), 0);
    assert!(fleet.controller.admission.vms_in_creation().is_empty());
    let (files_before, threads_before) = first.unwrap();
    // Other tests of this process may have some.
    assert!(open_files() <= files_before + 64, "{} files", open_files());
    assert!(threads() <= threads_before + 16, "{} threads", threads());
    // One record must stay, which numbers what follows.
    let later = army_node_api::time::now_ms() + 1000;
    while store.purge_ended(later).await.unwrap() > 0 {}
    assert_eq!(store.vms_ever().await.unwrap(), 1);
    tasks.abort();
}
