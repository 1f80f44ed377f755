//! The controller of an Army: it carries out what the API asks for.
//!
//! - [`Controller`] is the only entrance. The server of the API, and nothing else of it, holds one.
//! - `store` is the database: what was requested, and what hosts last reported. It is private.
//! - [`scheduler`] chooses hosts for new VMs, `admission` limits how many are created at a time, and
//!   `creation` has hosts create them.
//! - `reconcile` polls the nodes, and acts on the difference between what was requested and what
//!   they report.
//! - `templates`, `builds`, `hosts`, `vms` and `access` are the requests about each kind of object.
//! - [`guest`] has what is done in guests through their agents.
//!
//! Nodes are reached through [`NodeApi`] alone. This crate does not know HTTP, nor who a caller is:
//! the server authenticates callers and converts an [`Error`] into its own form.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod access;
mod admission;
mod border;
mod builds;
mod creation;
mod deadlines;
mod error;
mod events;
pub mod guest;
mod hosts;
mod idempotency;
mod loops;
mod random;
mod reconcile;
mod renewal;
pub mod scheduler;
mod store;
mod templates;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vms;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use army_node_api::requests::HostReport;
use army_node_api::{NodeApi, Remote};

pub use builds::BuildListener;
pub use creation::{CreatedVms, CreationFailure};
pub use error::{Error, ErrorKind, Result};
pub use events::EventReader;
pub use reconcile::InterruptedRequests;

use admission::Admission;
use border::Checked;
use loops::Loops;
use store::Store;

/// A controller of one or several hosts.
pub struct Controller {
    store: Store,
    nodes: RwLock<BTreeMap<String, Node>>,
    /// The last report of each host.
    reports: Mutex<HashMap<String, LastReport>>,
    /// The hosts that were recorded as unreachable.
    unreachable: Mutex<HashSet<String>>,
    /// The VMs that this process creates. VMs that an earlier process did not finish are recorded by
    /// the reports of their hosts.
    admission: Admission,
    loops: Loops,
    started: Instant,
    cluster: Option<Cluster>,
}

/// A node, in this process or elsewhere. Those of a controller are [`Checked`].
type Node = Arc<dyn NodeApi>;

/// What a controller of several hosts needs.
pub struct Cluster {
    /// How the controller connects to nodes.
    pub tls: rustls::ClientConfig,
    /// The fingerprint of the cluster's certificate authority.
    pub fingerprint: String,
}

/// The last report of a host.
#[derive(Clone)]
struct LastReport {
    report: HostReport,
    at: Instant,
}

/// A database that is open. A PostgreSQL database is locked for one controller while it is.
pub struct Database(Store);

impl Database {
    /// The URL of the SQLite database at `path`, which is created where it does not exist.
    pub fn sqlite_url(path: &Path) -> String {
        format!("sqlite://{}?mode=rwc", path.display())
    }

    /// Opens the database at `url`, of SQLite or PostgreSQL, and migrates it to the latest version.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where another controller uses it.
    pub async fn open(url: &str) -> Result<Self> {
        Store::open(url).await.map(Self)
    }
}

impl Controller {
    /// A controller of one host, whose node is in this process.
    pub fn of_one_host(database: Database, node: Arc<dyn NodeApi>) -> Self {
        let nodes = BTreeMap::from([(node.name().to_owned(), node)]);
        Self::new(database, nodes, None)
    }

    /// A controller of the hosts that have joined, and of those that will.
    ///
    /// # Errors
    /// Where the database cannot be read.
    pub async fn of_cluster(database: Database, cluster: Cluster) -> Result<Self> {
        let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
        for host in database.0.hosts().await? {
            let Some(address) = host.address else {
                continue;
            };
            let remote = Remote::new(&host.name, address, cluster.tls.clone())?;
            nodes.insert(host.name, Arc::new(remote));
        }
        Ok(Self::new(database, nodes, Some(cluster)))
    }

    fn new(database: Database, nodes: BTreeMap<String, Node>, cluster: Option<Cluster>) -> Self {
        let nodes = nodes.into_iter();
        let nodes = nodes.map(|(name, node)| (name, Arc::new(Checked(node)) as Node));
        Self {
            store: database.0,
            nodes: RwLock::new(nodes.collect()),
            reports: Mutex::default(),
            unreachable: Mutex::default(),
            admission: Admission::default(),
            loops: Loops::default(),
            started: Instant::now(),
            cluster,
        }
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
