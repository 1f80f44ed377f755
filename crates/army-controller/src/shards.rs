//! The hosts of this controller: which there are, which are its own, and a task for each of those.
//!
//! All hosts are known from the database, and any controller calls any node. Only the owner of a host
//! has its reports; what others know of it is what the owner writes down, less often.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use army_node_api::Remote;
use futures_util::future::join_all;
use tokio::task::{AbortHandle, JoinSet};

use crate::border::Checked;
use crate::fenced::{Fenced, HostEpoch};
use crate::host_task::HostTask;
use crate::store::hosts::HostRow;
use crate::{Controller, Error, ErrorKind, Node, Result, loops};

/// How often hosts and tasks are compared.
const ROUND: Duration = Duration::from_secs(2);
/// How old the hosts in memory may be where another controller may have changed them.
const FRESH: Duration = Duration::from_secs(1);

/// A node that the controller can call.
pub(crate) struct Connected {
    pub(crate) node: Node,
    epoch: Arc<HostEpoch>,
}

impl Connected {
    /// The node of a host, wrapped so that calls are in the host's epoch and answers are checked.
    pub(crate) fn new(node: Node, epoch: Arc<HostEpoch>) -> Self {
        let fenced: Node = Arc::new(Fenced::new(node, Arc::clone(&epoch)));
        Self {
            node: Arc::new(Checked(fenced)),
            epoch,
        }
    }
}

/// The hosts as they were last read.
pub(crate) struct HostTable {
    rows: Arc<Vec<HostRow>>,
    /// What [`Store::host_changes`](crate::store::Store::host_changes) was before.
    changes: u64,
    at: Instant,
}

/// The tasks of own hosts.
#[derive(Default)]
struct Tasks {
    all: JoinSet<()>,
    /// Each with the host's epoch when it was started.
    by_host: HashMap<String, (u64, AbortHandle)>,
}

impl Controller {
    fn host_table(&self) -> MutexGuard<'_, Option<HostTable>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The records of all hosts, by name. They are at most some time old where another controller
    /// changed them, and up to date where this one did.
    pub(crate) async fn host_rows(&self) -> Result<Arc<Vec<HostRow>>> {
        let changes = self.store.host_changes();
        if let Some(table) = &*self.host_table() {
            let is_fresh = !self.store.is_shared() || table.at.elapsed() < FRESH;
            if table.changes == changes && is_fresh {
                return Ok(Arc::clone(&table.rows));
            }
        }
        let at = Instant::now();
        let rows = Arc::new(self.store.hosts().await?);
        self.connect(&rows)?;
        let table = HostTable {
            rows: Arc::clone(&rows),
            changes,
            at,
        };
        let former = self.host_table().replace(table);
        if let Some(former) = former {
            self.note_measured(&former.rows, &rows);
        }
        Ok(rows)
    }

    /// Notes which hosts of other controllers were measured between two readings.
    fn note_measured(&self, former: &[HostRow], rows: &[HostRow]) {
        let former: HashMap<&str, u64> = former
            .iter()
            .map(|row| (row.name.as_str(), row.seen_ms))
            .collect();
        for row in rows.iter().filter(|row| !self.is_own(row)) {
            if former
                .get(row.name.as_str())
                .is_some_and(|seen_ms| *seen_ms < row.seen_ms)
            {
                self.admission.host_measured(&row.name);
            }
        }
    }

    /// Connects to hosts that have joined, at this controller or another, and drops those that were
    /// removed.
    fn connect(&self, rows: &[HostRow]) -> Result<()> {
        let Some(cluster) = &self.cluster else {
            return Ok(());
        };
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        for row in rows {
            let connected = nodes.get(&row.name);
            if let Some(address) = row.address
                && connected.and_then(|it| it.node.address()) != Some(address)
            {
                let remote = Remote::new(&row.name, address, cluster.tls.clone())?;
                let epoch = HostEpoch::new(&row.name, self.store.clone(), false);
                let connected = Connected::new(Arc::new(remote), epoch);
                nodes.insert(row.name.clone(), connected);
            }
            if let Some(connected) = nodes.get(&row.name) {
                connected.epoch.note(row.epoch);
            }
        }
        let names: HashSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        nodes.retain(|name, _| names.contains(name.as_str()));
        Ok(())
    }

    /// Whether this controller owns a host.
    pub(crate) fn is_own(&self, row: &HostRow) -> bool {
        row.owner.as_ref() == Some(&self.store.term().id)
    }

    /// The nodes of the own hosts, with the epochs of the hosts.
    pub(crate) async fn own_nodes(&self) -> Result<Vec<(u64, Node)>> {
        let rows = self.host_rows().await?;
        let own = rows.iter().filter(|row| self.is_own(row));
        let own = own.filter_map(|row| Some((row.epoch, self.find_node(&row.name)?)));
        Ok(own.collect())
    }

    /// Takes the hosts of this controller: the one in its process, or its share of the cluster's.
    pub(crate) async fn take_hosts(&self) -> Result<()> {
        match &self.cluster {
            Some(_) => self.store.keep_term(true).await.map(drop),
            None => {
                for node in self.nodes() {
                    self.store.claim_own_host(node.name()).await?;
                }
                Ok(())
            }
        }
    }

    /// Has every own host report once, and returns when all that follows from it is done.
    pub(crate) async fn poll_nodes(&self) -> Result<()> {
        self.mirror.refresh_now(&self.store).await?;
        self.read_creators().await?;
        let nodes = self.own_nodes().await?;
        let polls = nodes.into_iter();
        join_all(polls.map(|(_, node)| HostTask::new(self, node).run_once())).await;
        Ok(())
    }

    /// Runs a task for each own host, and those for figures and old records, until the term of this controller ends or a task fails, which
    /// is an error of the whole process.
    pub async fn reconcile(self: Arc<Self>) -> Error {
        let mut tasks = Tasks::default();
        if let Err(error) = self.take_hosts().await {
            tracing::error!(%error, "cannot take the hosts of this controller");
        }
        tasks.all.spawn(Arc::clone(&self).record_figures());
        tasks.all.spawn(Arc::clone(&self).purge());
        loop {
            self.loops.begin_round(loops::RECONCILE);
            match self.update_tasks(&mut tasks).await {
                Ok(()) => {}
                Err(error) if error.kind == ErrorKind::Superseded => return error,
                Err(error) => tracing::error!(%error, "cannot read which hosts there are"),
            }
            if let Err(error) = self.take_over_operations().await {
                tracing::warn!(%error, "cannot look for operations that nobody carries out");
            }
            tokio::select! {
                () = tokio::time::sleep(ROUND) => {}
                () = self.fleet_changed.notified() => {}
                Some(ended) = tasks.all.join_next() => match ended {
                    Err(error) if error.is_cancelled() => {}
                    // Tasks have no end of their own.
                    ended => {
                        let message = format!("a task has ended: {ended:?}");
                        return Error::new(ErrorKind::Internal, message);
                    }
                },
                () = self.store.term_ended() => {
                    let message = "another controller has taken over from this one";
                    return Error::new(ErrorKind::Superseded, message);
                }
            }
        }
    }

    /// Starts and ends tasks, so that each own host has one.
    async fn update_tasks(self: &Arc<Self>, tasks: &mut Tasks) -> Result<()> {
        self.read_wanted_standbys().await?;
        self.read_creators().await?;
        let own = self.own_nodes().await?;
        let own: BTreeMap<String, (u64, Node)> = own
            .into_iter()
            .map(|(epoch, node)| (node.name().to_owned(), (epoch, node)))
            .collect();
        tasks.by_host.retain(|host, (epoch, task)| {
            let stays = own.get(host).is_some_and(|(present, _)| present == epoch);
            if !stays {
                task.abort();
                self.forget_host(host);
            }
            stays
        });
        for (host, (epoch, node)) in own {
            if tasks.by_host.contains_key(&host) {
                continue;
            }
            let controller = Arc::clone(self);
            let task = tasks
                .all
                .spawn(async move { HostTask::new(&controller, node).run().await });
            tasks.by_host.insert(host, (epoch, task));
        }
        Ok(())
    }

    /// Drops what is known of the reports of a host that is not this controller's any more.
    pub(crate) fn forget_host(&self, host: &str) {
        self.reports().remove(host);
        self.mirror.remove_host(host);
        self.loops.end_host(host);
    }

    /// The numbers of standbys that a host should keep, by template, as they were last read.
    pub(crate) fn wanted_standbys(&self, host: &str) -> BTreeMap<String, u32> {
        let wanted = self.standbys.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.get(host).cloned().unwrap_or_default()
    }

    async fn read_wanted_standbys(&self) -> Result<()> {
        let read = self.store.standbys_by_host().await?;
        *self.standbys.lock().unwrap_or_else(PoisonError::into_inner) = read;
        Ok(())
    }
}
