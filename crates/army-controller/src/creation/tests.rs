//! VMs of a template that some hosts, or all, cannot run.

use std::sync::Arc;

use army_api::templates::CpuFeatures;
use army_api::vms::{CreateVms, VmFilter, VmMemory};
use army_node_api::ErrorKind as NodeErrorKind;
use army_node_api::simulated::SimulatedNode;

use super::*;
use crate::{Database, ErrorKind, Node};

/// The error of a fork on a host whose CPU is too old.
const LACKING: &str = "the saved state of CPU 1 is refused: avx512f (7.ebx bit 16)";

/// A host that reports these bits of a CPUID leaf, and creates all VMs.
fn host(name: &str, leaf_7: Option<u32>) -> SimulatedNode {
    match leaf_7 {
        Some(bits) => SimulatedNode::new(name).with_cpu(cpu(bits)),
        None => SimulatedNode::new(name),
    }
}

/// A host that creates no VM.
fn refusing(name: &str, leaf_7: Option<u32>, kind: NodeErrorKind) -> Arc<SimulatedNode> {
    let error = army_node_api::Error::new(kind, LACKING);
    Arc::new(host(name, leaf_7).with_creation(Err(error)))
}

fn cpu(leaf_7: u32) -> CpuFeatures {
    CpuFeatures {
        vendor: "AuthenticAMD".into(),
        features: [("7.ebx".into(), leaf_7)].into(),
    }
}

fn requester() -> Requester {
    Requester {
        tenant: "default".into(),
        ..Requester::default()
    }
}

/// A controller of hosts that have the template `t`, which needs AVX-512.
struct Fleet {
    controller: Arc<Controller>,
    _dir: tempfile::TempDir,
}

impl Fleet {
    async fn of(hosts: &[&Arc<SimulatedNode>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = Database::sqlite_url(&dir.path().join("army.db"));
        let nodes = hosts
            .iter()
            .map(|host| -> Node { Arc::<SimulatedNode>::clone(host) });
        let database = Database::open(&url).await.unwrap();
        let controller = Arc::new(Controller::of_simulated(database, nodes).await.unwrap());
        controller.recover().await.unwrap();
        let template = Template {
            name: "t".into(),
            host: hosts[0].name().into(),
            cpu: Some(cpu(1 << 16)),
            ..Template::default()
        };
        controller
            .store
            .insert_template(&template, None)
            .await
            .unwrap();
        for host in &hosts[1..] {
            let copied = controller.store.insert_copy("t", host.name()).await;
            copied.unwrap();
        }
        Self {
            controller,
            _dir: dir,
        }
    }

    async fn create(&self, count: u32) -> Result<CreatedVms> {
        let request = CreateVms {
            template: "t".into(),
            name: Some("vm".into()),
            count,
            ..CreateVms::default()
        };
        self.controller.create_and_wait(&requester(), request).await
    }

    async fn vm(&self, name: &str) -> Vm {
        let filter = VmFilter {
            all: true,
            ..VmFilter::default()
        };
        let page = self.controller.store.vms(&filter, None).await.unwrap();
        let mut vms = page.vms.into_iter();
        vms.find(|vm| vm.name == name).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_go_only_to_hosts_that_report_the_features_of_their_template() {
    let old = Arc::new(host("a-old", Some(0)));
    let new = Arc::new(host("b-new", Some(u32::MAX)));
    let fleet = Fleet::of(&[&old, &new]).await;
    let created = fleet.create(4).await.unwrap();
    assert!(created.vms.iter().all(|vm| vm.host == "b-new"));
    assert_eq!((old.requested_vms(), new.requested_vms()), (0, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_that_one_host_cannot_run_are_created_by_another() {
    // They do not report their CPUs.
    let old = refusing("a-old", None, NodeErrorKind::HostUnsupported);
    let new = Arc::new(host("b-new", None));
    let fleet = Fleet::of(&[&old, &new]).await;
    let created = fleet.create(4).await.unwrap();
    assert!(created.failures.is_empty(), "{:?}", created.failures);
    assert_eq!(created.vms.len(), 4);
    assert!(created.vms.iter().all(|vm| vm.host == "b-new"));
    assert_eq!((old.requested_vms(), new.requested_vms()), (2, 4));
    let kept = fleet.vm("vm-1").await;
    assert_eq!(
        (kept.host.as_str(), kept.state),
        ("b-new", VmState::Running)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_host_can_run_it_the_error_names_the_feature() {
    for cpu in [None, Some(0)] {
        let kind = NodeErrorKind::HostUnsupported;
        let (one, two) = (refusing("a", cpu, kind), refusing("b", cpu, kind));
        let fleet = Fleet::of(&[&one, &two]).await;
        let error = fleet.create(1).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::HostUnsupported, "{error}");
        assert!(error.message.contains("avx512f (7.ebx bit 16)"), "{error}");
        assert!(one.requested_vms() <= 1 && two.requested_vms() <= 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_no_host_could_run_is_recorded_as_failed() {
    let only = refusing("a", None, NodeErrorKind::HostUnsupported);
    let fleet = Fleet::of(&[&only]).await;
    fleet.create(1).await.unwrap_err();
    let vm = fleet.vm("vm").await;
    assert_eq!(vm.state, VmState::Failed);
    assert!(vm.reason.unwrap().contains("avx512f"));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_host_that_may_be_able_takes_none_it_is_worth_waiting() {
    let old = Arc::new(host("a-old", Some(0)));
    let new = Arc::new(host("b-new", Some(u32::MAX)));
    let fleet = Fleet::of(&[&old, &new]).await;
    let controller = &fleet.controller;
    controller.drain("b-new", true).await.unwrap();
    let error = fleet.create(1).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::HostUnavailable);
    assert!(error.message.contains("avx512f (7.ebx bit 16)"), "{error}");
    assert!(error.retry_after_s.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn other_failures_are_not_tried_elsewhere() {
    let bad = refusing("a", None, NodeErrorKind::Conflict);
    let drained = Arc::new(host("b", None));
    let fleet = Fleet::of(&[&bad, &drained]).await;
    fleet.controller.drain("b", true).await.unwrap();
    let error = fleet.create(1).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
    fleet.controller.drain("b", false).await.unwrap();
    assert_eq!((bad.requested_vms(), drained.requested_vms()), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_host_takes_no_live_forks_as_it_takes_no_vms() {
    let only = Arc::new(host("a", None));
    let fleet = Fleet::of(&[&only]).await;
    let parent = fleet.create(1).await.unwrap().vms.remove(0);
    let fork = async || {
        let request = ForkVm {
            count: 2,
            name: None,
        };
        let controller = &fleet.controller;
        let started = controller.fork_vm(&requester(), &parent, request).await?;
        created_vms(controller.outcome(started, None).await?)
    };
    fleet.controller.drain("a", true).await.unwrap();
    let error = fork().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    assert!(error.message.contains("drained"), "{error}");
    assert_eq!(only.requested_vms(), 1);
    fleet.controller.drain("a", false).await.unwrap();
    assert_eq!(fork().await.unwrap().vms.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_vm_is_resumed_where_there_is_room_for_what_it_gave_back() {
    let only = Arc::new(host("a", None));
    let fleet = Fleet::of(&[&only]).await;
    let vm = fleet.create(1).await.unwrap().vms.remove(0);
    let paused = fleet.controller.pause(&vm).await.unwrap();
    let swapped = |swapped_bytes: u64| Vm {
        memory: Some(VmMemory {
            swapped_bytes,
            ..VmMemory::default()
        }),
        ..paused.clone()
    };
    let error = fleet
        .controller
        .resume(&swapped(1 << 40))
        .await
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    // The host is not asked for anything but this VM, which it has.
    fleet.controller.drain("a", true).await.unwrap();
    let resumed = fleet.controller.resume(&swapped(1 << 20)).await.unwrap();
    assert_eq!(resumed.state, VmState::Running);
}
