//! What happens while a host is being polled.

use army_api::templates::Template;
use army_api::vms::{CreateVms, Vm};
use army_node_api::simulated::SimulatedNode;

use super::*;
use crate::Database;

/// A controller of one host, on which there is a template `t`.
async fn controller() -> (tempfile::TempDir, Arc<Controller>, Arc<SimulatedNode>) {
    let dir = tempfile::tempdir().unwrap();
    let url = Database::sqlite_url(&dir.path().join("army.db"));
    let database = Database::open(&url).await.unwrap();
    let host = Arc::new(SimulatedNode::new("here").gated());
    let node: Node = Arc::<SimulatedNode>::clone(&host);
    let controller = Arc::new(Controller::of_one_host(database, node));
    host.reports.release();
    controller.poll_nodes().await;
    host.reports.arrival().await;
    let template = Template {
        name: "t".into(),
        host: "here".into(),
        hosts: vec!["here".into()],
        ..Template::default()
    };
    controller.store.insert_template(&template).await.unwrap();
    (dir, controller, host)
}

async fn create(controller: &Controller) -> Vm {
    let request = CreateVms {
        template: "t".to_owned(),
        count: 1,
        ..CreateVms::default()
    };
    let created = controller.create("default", request, None).await;
    created.unwrap().vms.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_created_or_destroyed_while_its_host_is_polled_is_not_lost() {
    let (_dir, controller, host) = controller().await;
    let poll = || {
        let controller = Arc::clone(&controller);
        tokio::spawn(async move { controller.poll_nodes().await })
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
    controller.poll_nodes().await;
    let vm = controller.store.vm(&id).await.unwrap();
    assert_eq!(vm.state, VmState::Failed);
    assert!(vm.reason.unwrap().contains("does not know the VM"));
}
