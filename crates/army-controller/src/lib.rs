//! The controller of an Army: it carries out what the API asks for.
//!
//! - [`Controller`] is the only entrance. The server of the API, and nothing else of it, holds one.
//! - `store` is the database: what was requested, and what hosts last reported. It is private.
//! - [`scheduler`] chooses hosts for new VMs, `admission` limits how many are created at a time, and
//!   `creation` has hosts create them.
//! - `shards` runs a task for each host that this controller owns (`host_task`). `reconcile` compares
//!   what a host reports with what was requested, by the copy that `mirror` has of it.
//! - `fenced` adds the host's epoch to each call, by which nodes refuse controllers that were replaced.
//! - [`operations`] has work that goes on to its end whatever becomes of its client: it is recorded
//!   first, and a controller that has ended leaves it to another one.
//! - `templates`, `builds`, `hosts`, `vms` and `access` are the requests about each kind of object.
//! - [`guest`] and [`guest_files`] have what is done in guests through their agents.
//!
//! Nodes are reached through [`NodeApi`] alone. This crate does not know HTTP, nor who a caller is:
//! the server authenticates callers and converts an [`Error`] into its own form.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod access;
mod actor;
mod admission;
mod audience;
mod border;
mod builds;
mod changes;
mod checkpoints;
mod commands;
mod creation;
mod deadlines;
mod error;
mod evacuation;
mod events;
mod fenced;
mod figures;
pub mod guest;
pub mod guest_files;
mod host_task;
mod hosts;
mod limits;
mod loops;
mod measured;
mod mirror;
mod moves;
mod operation_list;
pub mod operations;
mod purge;
mod random;
mod reconcile;
mod renewal;
pub mod scheduler;
mod shards;
mod store;
mod templates;
mod terms;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vms;
mod webhooks;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use army_node_api::NodeApi;
use army_node_api::requests::HostReport;
use tokio::sync::Notify;

pub use actor::{Actor, SYSTEM};
pub use builds::BuildListener;
pub use creation::{CreatedVms, CreationFailure};
pub use error::{Error, ErrorKind, Result};
pub use events::EventReader;
pub use hosts::Joining;
pub use limits::Limits;
pub use operations::{Operation, Outcome, Output, Requester, StartedOperation};
pub use purge::DEFAULT_KEPT;
pub use webhooks::{Delivery, WebhookSender};

use access::KeyUses;
use admission::Admission;
use fenced::HostEpoch;
use loops::Loops;
use measured::Written;
use mirror::Mirror;
use moves::MovePermits;
use operations::Running;
use reconcile::Creators;
use shards::{Connected, HostTable};
use store::Store;
use webhooks::InDelivery;

/// A controller of one or several hosts.
pub struct Controller {
    store: Store,
    /// The nodes of all hosts.
    nodes: RwLock<BTreeMap<String, Connected>>,
    /// All hosts, as they were last read from the database.
    hosts: Mutex<Option<HostTable>>,
    /// The last report of each own host.
    reports: Mutex<HashMap<String, LastReport>>,
    /// What was last written down of each own host.
    written: Mutex<Written>,
    /// The VMs of own hosts.
    mirror: Mirror,
    /// The standbys that each host should keep, by template, as they were last read.
    standbys: Mutex<HashMap<String, BTreeMap<String, u32>>>,
    /// The other controllers, as they were last read.
    creators: Mutex<Creators>,
    /// Notified when the own hosts have changed.
    fleet_changed: Notify,
    /// How long the records of VMs that have ended are kept.
    kept_ended: Duration,
    /// The VMs that this process creates. VMs that an earlier process did not finish are recorded by
    /// the reports of their hosts.
    admission: Arc<Admission>,
    operations: Running,
    move_permits: MovePermits,
    limits: Limits,
    loops: Loops,
    key_uses: KeyUses,
    in_delivery: InDelivery,
    started: Instant,
    cluster: Option<Cluster>,
}

/// A node, in this process or elsewhere.
type Node = Arc<dyn NodeApi>;

/// What a controller of several hosts needs.
pub struct Cluster {
    /// How the controller connects to nodes.
    pub tls: rustls::ClientConfig,
    /// The fingerprint of the cluster's certificate authority.
    pub fingerprint: String,
}

/// The last report of a host.
struct LastReport {
    /// The report, without its VMs.
    report: HostReport,
    /// The number of its VMs that have not ended.
    vms: u32,
    at: Instant,
    /// The same in milliseconds since 1970.
    seen_ms: u64,
}

/// A database that is open, in a term of its own: with PostgreSQL beside other controllers, and with
/// SQLite instead of them.
pub struct Database(Store);

impl Database {
    /// The URL of the SQLite database at `path`, which is created where it does not exist.
    pub fn sqlite_url(path: &Path) -> String {
        format!("sqlite://{}?mode=rwc", path.display())
    }

    /// Opens the database at `url`, of SQLite or PostgreSQL, and migrates it to the latest version.
    ///
    /// # Errors
    /// Where the database cannot be used.
    pub async fn open(url: &str) -> Result<Self> {
        Store::open(url).await.map(Self)
    }
}

impl Controller {
    /// A controller of one host, whose node is in this process.
    pub fn of_one_host(database: Database, node: Arc<dyn NodeApi>) -> Self {
        let name = node.name().to_owned();
        let epoch = HostEpoch::new(&name, database.0.clone(), true);
        let nodes = BTreeMap::from([(name, Connected::new(node, epoch))]);
        Self::new(database, nodes, None)
    }

    /// A controller of the hosts that have joined, and of those that will.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where other controllers of the database have another authority, and
    /// where the database cannot be used.
    pub async fn of_cluster(database: Database, cluster: Cluster) -> Result<Self> {
        database.0.check_authority(&cluster.fingerprint).await?;
        let controller = Self::new(database, BTreeMap::new(), Some(cluster));
        controller.host_rows().await?;
        Ok(controller)
    }

    /// A controller of the hosts of these nodes, which are simulated. Those that have not joined do.
    ///
    /// # Errors
    /// Where the database cannot be used.
    #[cfg(any(test, feature = "testing"))]
    pub async fn of_simulated(
        database: Database,
        nodes: impl IntoIterator<Item = Arc<dyn NodeApi>>,
    ) -> Result<Self> {
        let mut connected = BTreeMap::new();
        let nodes: Vec<Arc<dyn NodeApi>> = nodes.into_iter().collect();
        let names: Vec<String> = nodes.iter().map(|node| node.name().to_owned()).collect();
        database.0.join_hosts(&names).await?;
        for node in nodes {
            let epoch = HostEpoch::new(node.name(), database.0.clone(), false);
            let name = node.name().to_owned();
            connected.insert(name, Connected::new(node, epoch));
        }
        Ok(Self::new(database, connected, Some(testing::no_cluster()?)))
    }

    fn new(
        database: Database,
        nodes: BTreeMap<String, Connected>,
        cluster: Option<Cluster>,
    ) -> Self {
        Self {
            store: database.0,
            nodes: RwLock::new(nodes),
            hosts: Mutex::default(),
            reports: Mutex::default(),
            written: Mutex::default(),
            mirror: Mirror::default(),
            standbys: Mutex::default(),
            creators: Mutex::default(),
            fleet_changed: Notify::new(),
            kept_ended: purge::DEFAULT_KEPT,
            admission: Arc::default(),
            operations: Running::default(),
            move_permits: MovePermits::default(),
            limits: Limits::default(),
            loops: Loops::default(),
            key_uses: KeyUses::default(),
            in_delivery: InDelivery::default(),
            started: Instant::now(),
            cluster,
        }
    }

    /// Sets the limits of an operator.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    fn reports(&self) -> MutexGuard<'_, HashMap<String, LastReport>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs work that blocks on a thread for such work.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            let message = format!("a task failed: {error}");
            Err(Error::new(ErrorKind::Internal, message))
        })
}
