//! What happens while a host is being asked, with a host that answers when it is told to.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use agent_proto::client::Connection;
use army_api::hosts::Capacity;
use army_api::templates::Template;
use army_api::vms::{Balloon, CreateVms, Vm, VmState};
use army_api::{Problem, ProblemKind};

use crate::Controller;
use crate::store::Store;
use army_node_api::Origin;
use army_node_api::VmSpec;
use army_node_api::host::Host;
use army_node_api::pipe::{Pieces, Sender as PieceSender};
use army_node_api::{InUse, Made, Report, Result, TemplateFacts};

/// What the host is asked, in order.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Report,
    Create,
}

/// A host that says what it is asked, and answers each question when it is let.
struct Slow {
    asked: Mutex<Sender<Asked>>,
    reports: Mutex<Receiver<()>>,
    creations: Mutex<Receiver<()>>,
}

/// The test's side of it.
struct Strings {
    asked: Receiver<Asked>,
    report: Sender<()>,
    create: Sender<()>,
}

fn slow() -> (Arc<Slow>, Strings) {
    let (asked_in, asked) = channel();
    let (report, reports) = channel();
    let (create, creations) = channel();
    let host = Slow {
        asked: Mutex::new(asked_in),
        reports: Mutex::new(reports),
        creations: Mutex::new(creations),
    };
    let strings = Strings {
        asked,
        report,
        create,
    };
    (Arc::new(host), strings)
}

impl Slow {
    fn tell(&self, asked: Asked) {
        self.asked.lock().unwrap().send(asked).unwrap();
    }
}

fn no<T>() -> Result<T> {
    Err(Problem::new(ProblemKind::Internal, "nobody asks for this"))
}

impl Host for Slow {
    fn name(&self) -> &str {
        "here"
    }

    fn address(&self) -> Option<SocketAddr> {
        None
    }

    fn create(&self, _: &str, entries: &[VmSpec]) -> Vec<Result<Made>> {
        self.tell(Asked::Create);
        self.creations.lock().unwrap().recv().unwrap();
        let made = Made {
            warm: true,
            running_us: 1,
            identity_us: 1,
            notices: Vec::new(),
        };
        entries.iter().map(|_| Ok(made.clone())).collect()
    }

    fn fork_live(&self, _: &str, _: &[VmSpec]) -> Vec<Result<Made>> {
        Vec::new()
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

    fn send_template(&self, _: &str, _: PieceSender) -> Result<()> {
        no()
    }

    fn receive_template(&self, _: &str, _: Pieces) -> Result<TemplateFacts> {
        no()
    }

    /// No VMs: what it is asked for comes after it has looked.
    fn report(&self) -> Result<Report> {
        self.tell(Asked::Report);
        self.reports.lock().unwrap().recv().unwrap();
        Ok(Report {
            capacity: Capacity {
                cpus: 2,
                memory_bytes: 16 << 30,
                available_bytes: 16 << 30,
                ..Capacity::default()
            },
            missing_jail_layers: Vec::new(),
            vms: Vec::new(),
            ready: HashMap::new(),
            cpu: None,
        })
    }

    fn forget(&self, _: &[String]) -> Result<()> {
        Ok(())
    }

    fn certificate_request(&self) -> Result<Option<String>> {
        no()
    }

    fn take_certificate(&self, _: &str) -> Result<()> {
        no()
    }
}

/// A controller of that host, on which there is a template `t`.
async fn controller() -> (tempfile::TempDir, Arc<Controller>, Strings) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&Store::sqlite(&dir.path().join("army.db"))).await;
    let (host, strings) = slow();
    let controller = Arc::new(Controller::alone(store.unwrap(), host));
    strings.report.send(()).unwrap();
    controller.hear_all().await;
    assert_eq!(strings.asked.recv().unwrap(), Asked::Report);
    let template = Template {
        name: "t".into(),
        host: "here".into(),
        hosts: vec!["here".into()],
        ..Template::default()
    };
    controller.store.add_template(&template).await.unwrap();
    (dir, controller, strings)
}

/// Makes a VM of it.
async fn create(controller: &Controller) -> Vm {
    let asked = CreateVms {
        template: "t".to_owned(),
        count: 1,
        ..CreateVms::default()
    };
    let created = controller.create("default", asked, None).await;
    created.unwrap().vms.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_finished_or_destroyed_while_its_host_is_asked_is_not_lost() {
    let (_dir, controller, strings) = controller().await;
    let hear = || {
        let controller = Arc::clone(&controller);
        tokio::spawn(async move { controller.hear_all().await })
    };
    let creation = {
        let controller = Arc::clone(&controller);
        tokio::spawn(async move { create(&controller).await })
    };
    assert_eq!(strings.asked.recv().unwrap(), Asked::Create);
    let heard = hear();
    assert_eq!(strings.asked.recv().unwrap(), Asked::Report);
    strings.create.send(()).unwrap();
    let id = creation.await.unwrap().id;
    let vm = async || -> Vm { controller.store.vm(&id, None).await.unwrap() };
    strings.report.send(()).unwrap();
    heard.await.unwrap();
    assert_eq!(vm().await.state, VmState::Running, "{:?}", vm().await);

    let heard = hear();
    assert_eq!(strings.asked.recv().unwrap(), Asked::Report);
    controller.store.unwant_vm(&id).await.unwrap();
    strings.report.send(()).unwrap();
    heard.await.unwrap();
    assert_eq!(vm().await.state, VmState::Running, "{:?}", vm().await);

    let heard = hear();
    assert_eq!(strings.asked.recv().unwrap(), Asked::Report);
    strings.report.send(()).unwrap();
    heard.await.unwrap();
    assert_eq!(vm().await.state, VmState::Ended);
    assert_eq!(vm().await.reason.as_deref(), Some("destroyed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_host_does_not_know_any_more_is_lost() {
    let (_dir, controller, strings) = controller().await;
    strings.create.send(()).unwrap();
    let id = create(&controller).await.id;
    strings.report.send(()).unwrap();
    controller.hear_all().await;
    let vm = controller.store.vm(&id, None).await.unwrap();
    assert_eq!(vm.state, VmState::Failed);
    assert!(vm.reason.unwrap().contains("does not know the VM"));
}
