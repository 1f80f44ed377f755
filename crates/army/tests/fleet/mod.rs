//! Controllers of a fleet of simulated hosts.
// Each test program uses its part of it.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use army_api::vms::{CreateVms, Vm, VmFilter};
use army_controller::testing::Records;
use army_controller::{Controller, Database, Requester};
use army_node_api::NodeApi;
use army_node_api::simulated::SimulatedNode;
use tokio::task::JoinHandle;

use crate::served::{self, Postgres};

/// A controller that runs as the process of one does.
pub struct Running {
    pub controller: Arc<Controller>,
    pub records: Records,
    tasks: Vec<JoinHandle<()>>,
}

impl Running {
    pub async fn start(postgres: &Postgres, nodes: &[Arc<SimulatedNode>]) -> Self {
        let database = postgres.open().await;
        Self::of(database, nodes).await
    }

    pub async fn of(database: Database, nodes: &[Arc<SimulatedNode>]) -> Self {
        let records = Records::of(&database);
        let controller = Controller::of_simulated(database, as_nodes(nodes));
        let controller = controller.await.unwrap();
        let controller = Arc::new(controller);
        let term = Arc::clone(&controller).hold_term();
        let reconcile = Arc::clone(&controller).reconcile();
        let tasks = vec![
            tokio::spawn(async { drop(term.await) }),
            tokio::spawn(async { drop(reconcile.await) }),
        ];
        Self {
            controller,
            records,
            tasks,
        }
    }

    /// Ends all that it does, as a kill does, and without giving anything back.
    pub fn kill(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn as_nodes(nodes: &[Arc<SimulatedNode>]) -> Vec<Arc<dyn NodeApi>> {
    let as_node =
        |node: &Arc<SimulatedNode>| -> Arc<dyn NodeApi> { Arc::<SimulatedNode>::clone(node) };
    nodes.iter().map(as_node).collect()
}

pub fn hosts(count: usize) -> Vec<Arc<SimulatedNode>> {
    let host = |number| Arc::new(SimulatedNode::new(&format!("host-{number:02}")));
    (0..count).map(host).collect()
}

/// The number of hosts that each of the controllers owns, if together they own all.
pub async fn shares(controllers: &[&Running], hosts: usize) -> Option<Vec<usize>> {
    let owned = controllers[0].records.hosts_by_owner().await.unwrap();
    let of = |it: &&Running| owned.get(&it.records.controller_id()).map_or(0, Vec::len);
    let shares: Vec<usize> = controllers.iter().map(of).collect();
    (shares.iter().sum::<usize>() == hosts).then_some(shares)
}

pub async fn wait(what: &str, limit: Duration, mut done: impl AsyncFnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !done().await {
        assert!(start.elapsed() < limit, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    start.elapsed()
}

pub fn requester() -> Requester {
    Requester {
        tenant: "default".into(),
        is_administrator: true,
        ..Requester::default()
    }
}

pub async fn create(controller: &Arc<Controller>) -> army_controller::Result<Vm> {
    let request = CreateVms {
        template: "t".into(),
        count: 1,
        ..CreateVms::default()
    };
    let created = controller.create_and_wait(&requester(), request).await?;
    Ok(created.vms.into_iter().next().unwrap())
}

/// The VMs that have not ended by the database.
pub async fn alive(records: &Records) -> BTreeMap<String, Vm> {
    let filter = VmFilter {
        limit: Some(10_000),
        ..VmFilter::default()
    };
    let vms = records.vms(&filter).await.unwrap().vms.into_iter();
    vms.map(|vm| (vm.id.clone(), vm)).collect()
}

pub async fn template(records: &Records, nodes: &[Arc<SimulatedNode>]) {
    let hosts: Vec<String> = nodes.iter().map(|it| it.name().to_owned()).collect();
    let template = army_api::templates::Template {
        name: "t".into(),
        host: hosts[0].clone(),
        ..served::template("t")
    };
    records.insert_template(&template).await.unwrap();
    for host in &hosts {
        records.insert_copy("t", host).await.unwrap();
    }
}
