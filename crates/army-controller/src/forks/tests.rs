//! VMs of a template that some hosts, or all, cannot run; with hosts that answer as they are made.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use agent_proto::client::Connection;
use army_api::hosts::Capacity;
use army_api::templates::CpuFeatures;
use army_api::vms::{Balloon, CreateVms};

use super::*;
use crate::Node;
use crate::store::Store;
use army_node_api::Origin;
use army_node_api::host::Host;
use army_node_api::pipe::{Pieces, Sender};
use army_node_api::{InUse, Report, TemplateFacts};

/// What a fork says on a host whose CPU is too old.
const LACKING: &str = "the saved state of CPU 1 is refused: avx512f (7.ebx bit 16)";

/// A host that reports `cpu` and answers every fork alike.
struct Fake {
    name: &'static str,
    cpu: Option<CpuFeatures>,
    answer: Result<Made>,
    /// How many VMs it was asked for.
    asked: Mutex<usize>,
}

const MADE: Made = Made {
    warm: false,
    running_us: 1,
    identity_us: 1,
    notices: Vec::new(),
};

fn host(name: &'static str, leaf_7: Option<u32>, answer: Result<Made>) -> Arc<Fake> {
    let cpu = leaf_7.map(|bits| CpuFeatures {
        vendor: "AuthenticAMD".into(),
        features: [("7.ebx".into(), bits)].into(),
    });
    Arc::new(Fake {
        name,
        cpu,
        answer,
        asked: Mutex::default(),
    })
}

fn refusal(kind: ProblemKind) -> Result<Made> {
    Err(Problem::new(kind, LACKING))
}

impl Fake {
    fn asked(&self) -> usize {
        *self.asked.lock().unwrap()
    }
}

fn no<T>() -> Result<T> {
    Err(Problem::new(ProblemKind::Internal, "no test asks for this"))
}

impl Host for Fake {
    fn name(&self) -> &str {
        self.name
    }
    fn address(&self) -> Option<SocketAddr> {
        None
    }
    fn create(&self, _: &str, entries: &[VmSpec]) -> Vec<Result<Made>> {
        *self.asked.lock().unwrap() += entries.len();
        entries.iter().map(|_| self.answer.clone()).collect()
    }
    fn fork_live(&self, _: &str, entries: &[VmSpec]) -> Vec<Result<Made>> {
        self.create("", entries)
    }
    fn destroy(&self, _: &str, _: &str) -> Result<()> {
        Ok(())
    }
    fn pause(&self, _: &str) -> Result<()> {
        no()
    }
    fn resume(&self, _: &str) -> Result<()> {
        no()
    }
    fn balloon(&self, _: &str, _: Option<u64>) -> Result<Balloon> {
        no()
    }
    fn snapshot(&self, _: &str, _: &str, _: bool) -> Result<TemplateFacts> {
        no()
    }
    fn agent(&self, _: &str) -> Result<(Connection, InUse)> {
        no()
    }
    fn template(&self, _: &str) -> Result<TemplateFacts> {
        no()
    }
    fn keep(&self, _: &str, _: u32) -> Result<()> {
        Ok(())
    }
    fn remove_template(&self, _: &str) -> Result<()> {
        no()
    }
    fn fetch(&self, _: &Origin) -> Result<()> {
        no()
    }
    fn send_template(&self, _: &str, _: Sender) -> Result<()> {
        no()
    }
    fn receive_template(&self, _: &str, _: Pieces) -> Result<TemplateFacts> {
        no()
    }
    fn report(&self) -> Result<Report> {
        Ok(Report {
            capacity: Capacity {
                cpus: 2,
                memory_bytes: 16 << 30,
                available_bytes: 16 << 30,
                ..Capacity::default()
            },
            vms: Vec::new(),
            missing_jail_layers: Vec::new(),
            ready: HashMap::new(),
            cpu: self.cpu.clone(),
        })
    }
    fn forget(&self, _: &[String]) -> Result<()> {
        Ok(())
    }
    fn certificate_request(&self) -> Result<Option<String>> {
        Ok(None)
    }
    fn take_certificate(&self, _: &str) -> Result<()> {
        no()
    }
}

/// A controller of these hosts, all of which have the template `t`, which needs AVX-512.
struct Fleet {
    controller: Controller,
    _dir: tempfile::TempDir,
}

impl Fleet {
    async fn of(hosts: &[&Arc<Fake>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Store::sqlite(&dir.path().join("army.db"))).await;
        let nodes = hosts.iter().map(|host| {
            let node: Node = Arc::<Fake>::clone(host);
            (host.name.to_owned(), node)
        });
        let controller = Controller::new(store.unwrap(), nodes.collect(), None);
        controller.take_up_all().await.unwrap();
        let template = Template {
            name: "t".into(),
            host: hosts[0].name.into(),
            cpu: Some(CpuFeatures {
                vendor: "AuthenticAMD".into(),
                features: [("7.ebx".into(), 1 << 16)].into(),
            }),
            ..Template::default()
        };
        controller.store.add_template(&template).await.unwrap();
        for host in &hosts[1..] {
            controller.store.add_copy("t", host.name).await.unwrap();
        }
        Self {
            controller,
            _dir: dir,
        }
    }

    async fn create(&self, count: u32) -> Result<CreatedVms> {
        let asked = CreateVms {
            template: "t".into(),
            name: Some("vm".into()),
            count,
            ..CreateVms::default()
        };
        self.controller.create("default", asked, None).await
    }

    async fn vm(&self, name: &str) -> Vm {
        let filter = army_api::vms::VmFilter {
            all: true,
            ..Default::default()
        };
        let page = self.controller.store.vms(&filter, None).await.unwrap();
        let mut vms = page.vms.into_iter();
        vms.find(|vm| vm.name == name).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_go_only_to_hosts_that_report_the_features_of_their_template() {
    let old = host("a-old", Some(0), Ok(MADE));
    let new = host("b-new", Some(u32::MAX), Ok(MADE));
    let fleet = Fleet::of(&[&old, &new]).await;
    let created = fleet.create(4).await.unwrap();
    assert!(created.vms.iter().all(|vm| vm.host == "b-new"));
    assert_eq!((old.asked(), new.asked()), (0, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_host_cannot_run_another_is_asked_for() {
    // They report nothing, as nodes of former versions do.
    let old = host("a-old", None, refusal(ProblemKind::HostUnsupported));
    let new = host("b-new", None, Ok(MADE));
    let fleet = Fleet::of(&[&old, &new]).await;
    let created = fleet.create(4).await.unwrap();
    assert!(created.failures.is_empty(), "{:?}", created.failures);
    assert_eq!(created.vms.len(), 4);
    assert!(created.vms.iter().all(|vm| vm.host == "b-new"));
    assert_eq!((old.asked(), new.asked()), (2, 4));
    let kept = fleet.vm("vm-1").await;
    assert_eq!(
        (kept.host.as_str(), kept.state),
        ("b-new", VmState::Running)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_host_can_run_it_the_answer_is_409_and_names_the_feature() {
    for cpu in [None, Some(0)] {
        let refuses = || refusal(ProblemKind::HostUnsupported);
        let (one, two) = (host("a", cpu, refuses()), host("b", cpu, refuses()));
        let fleet = Fleet::of(&[&one, &two]).await;
        let problem = fleet.create(1).await.unwrap_err();
        assert_eq!(problem.kind, ProblemKind::HostUnsupported, "{problem}");
        assert_eq!(problem.status, 409);
        assert!(
            problem.detail.contains("avx512f (7.ebx bit 16)"),
            "{problem}"
        );
        assert!(one.asked() <= 1 && two.asked() <= 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_no_host_could_run_is_written_down_as_failed() {
    let only = host("a", None, refusal(ProblemKind::HostUnsupported));
    let fleet = Fleet::of(&[&only]).await;
    fleet.create(1).await.unwrap_err();
    let vm = fleet.vm("vm").await;
    assert_eq!(vm.state, VmState::Failed);
    assert!(vm.reason.unwrap().contains("avx512f"));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_host_that_may_be_able_takes_none_the_answer_is_503() {
    let old = host("a-old", Some(0), Ok(MADE));
    let new = host("b-new", Some(u32::MAX), Ok(MADE));
    let fleet = Fleet::of(&[&old, &new]).await;
    let store = &fleet.controller.store;
    store.drain_host("b-new", true).await.unwrap();
    let problem = fleet.create(1).await.unwrap_err();
    assert_eq!(problem.status, 503);
    assert!(
        problem.detail.contains("avx512f (7.ebx bit 16)"),
        "{problem}"
    );
    assert!(problem.retry_after_s.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn other_failures_are_not_tried_elsewhere() {
    let bad = host("a", None, refusal(ProblemKind::Conflict));
    let drained = host("b", None, Ok(MADE));
    let fleet = Fleet::of(&[&bad, &drained]).await;
    fleet.controller.store.drain_host("b", true).await.unwrap();
    let problem = fleet.create(1).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Conflict);
    fleet.controller.store.drain_host("b", false).await.unwrap();
    assert_eq!((bad.asked(), drained.asked()), (1, 0));
}
