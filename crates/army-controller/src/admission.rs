//! Admission of requests for VMs: how many are in progress, the memory that they have reserved, and
//! the number of forks that a host carries out at a time.
//!
//! A burst of requests is placed in no time, while VMs are created one after the other. So a VM
//! counts as using what the clones of its template use on average, from its placement until the figures
//! of its host have it, and each host works on as many forks at a time as it has use for.
//!
//! A request that finds no room only because of such estimates waits, since hosts are measured all
//! the time, and what is measured is mostly less. Requests for the same template wait in a queue,
//! whose first one tries again. A request is refused at once where the measured figures leave no
//! room, and where the queue is full.

mod costs;
mod counts;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::error::RETRY_S;
use crate::scheduler::{self, HostView, Need};
use crate::{Error, ErrorKind, Result};

use costs::Costs;
use counts::Counts;

/// The number of requests that may be in progress, including those that wait. Each is a task and
/// some rows; none holds a thread.
const REQUESTS: usize = 8192;
/// The number of forks that even the smallest host carries out at a time.
const FORKS: usize = 8;
/// How long a request waits for the measurement of hosts whose room is only estimated.
pub(super) const WAIT: Duration = Duration::from_secs(30);
/// How often at most the first request of a queue tries again.
const TRY: Duration = Duration::from_millis(50);

/// All requests for VMs that are in progress.
pub(super) struct Admission {
    requests: Arc<Semaphore>,
    forks: Mutex<HashMap<String, Arc<Semaphore>>>,
    state: Mutex<State>,
    /// Notified when a host was measured.
    measured: Notify,
    queues: Mutex<HashMap<Queue, Arc<tokio::sync::Mutex<()>>>>,
}

/// The requests that wait in one queue: those for the same template on the same hosts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Queue {
    /// The name of the template.
    pub(super) template: String,
    /// The labels that hosts must have.
    pub(super) labels: BTreeMap<String, String>,
}

#[derive(Default)]
struct State {
    /// The ids of the VMs that are being created.
    vms: HashSet<String>,
    /// VMs that are being created.
    reserved: Counts,
    /// VMs that were created since their host was last measured.
    unmeasured: Counts,
    /// The unmeasured VMs of hosts that are being measured.
    measuring: HashMap<String, Counts>,
    /// The VMs that each host's last measurement has found for the first time.
    measured: HashMap<String, Counts>,
    /// What a clone of each template costs, as measured.
    costs: Costs,
}

/// A request that was admitted. It ends when this is dropped.
pub(super) struct AdmittedRequest {
    admission: Arc<Admission>,
    vms: Vec<String>,
    reserved: Counts,
    _place: OwnedSemaphorePermit,
}

/// Why VMs were not placed.
#[derive(Debug)]
pub(super) enum Refusal {
    /// There is room by what was measured, but not by what is estimated since.
    Estimated(Error),
    /// There is no room, or no host that may be chosen.
    Final(Error),
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            requests: Arc::new(Semaphore::new(REQUESTS)),
            forks: Mutex::default(),
            state: Mutex::default(),
            measured: Notify::new(),
            queues: Mutex::default(),
        }
    }
}

impl Admission {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a request.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where too many are in progress.
    pub(super) fn admit(self: &Arc<Self>) -> Result<AdmittedRequest> {
        let place = Arc::clone(&self.requests).try_acquire_owned();
        let place = place.map_err(|_| {
            let message = format!("{REQUESTS} requests for VMs are in progress");
            Error::new(ErrorKind::Busy, message)
                .advise("try again later, or request several VMs at once")
                .retry_after(RETRY_S)
        })?;
        Ok(AdmittedRequest {
            admission: Arc::clone(self),
            vms: Vec::new(),
            reserved: Counts::default(),
            _place: place,
        })
    }

    /// The ids of all VMs that are being created.
    pub(super) fn vms_in_creation(&self) -> HashSet<String> {
        self.state().vms.clone()
    }

    /// Records that a host is about to be measured: VMs that are created from now on may be missing
    /// in the result.
    pub(super) fn begin_measurement(&self, host: &str) {
        let mut state = self.state();
        let unmeasured = state.unmeasured.of_host(host);
        state.measuring.insert(host.to_owned(), unmeasured);
    }

    /// Records that a host was measured. The VMs that were on it when the measurement before began
    /// count by what they use from now on: whoever has read the figures of that one, or places VMs by
    /// them at this moment, still finds the VMs counted that are missing there.
    pub(super) fn host_measured(&self, host: &str) {
        let mut state = self.state();
        let seen = state.measuring.remove(host);
        let mut seen = seen.unwrap_or_else(|| state.unmeasured.of_host(host));
        let before = state.measured.remove(host).unwrap_or_default();
        state.unmeasured.subtract(&before);
        seen.subtract(&before);
        state.measured.insert(host.to_owned(), seen);
        drop(state);
        self.measured.notify_waiters();
    }

    /// Records what clones of a template cost on a host, in bytes.
    pub(super) fn template_measured(&self, template: &str, cost_bytes: u64) {
        self.state().costs.record(template, cost_bytes);
    }

    /// What a clone of a template cost when some were last measured, in bytes.
    pub(super) fn measured_cost(&self, template: &str) -> Option<u64> {
        self.state().costs.of(template)
    }

    /// Waits until a host with `cpus` processors may carry out one more request's forks.
    pub(super) async fn fork_permit(&self, host: &str, cpus: u32) -> Option<OwnedSemaphorePermit> {
        let forks = {
            let mut all = self.forks.lock().unwrap_or_else(PoisonError::into_inner);
            let forks = all.entry(host.to_owned()).or_insert_with(|| {
                // Half of the time of a fork is spent waiting for the kernel.
                Arc::new(Semaphore::new(FORKS.max(2 * cpus as usize)))
            });
            Arc::clone(forks)
        };
        // The semaphore is never closed.
        forks.acquire_owned().await.ok()
    }

    /// Tries to place VMs until that succeeds, is refused for good, or has been tried for `limit`.
    pub(super) async fn place_in_turn<T, F>(
        &self,
        queue: Queue,
        limit: Duration,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<std::result::Result<T, Refusal>>>,
    {
        match attempt().await? {
            Ok(placed) => return Ok(placed),
            Err(Refusal::Final(error)) => return Err(error),
            Err(Refusal::Estimated(_)) => {}
        }
        let end = Instant::now() + limit;
        let turn = {
            let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            // Queues in which nobody waits are only held here.
            queues.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(queues.entry(queue).or_default())
        };
        let first = tokio::time::timeout_at(end, turn.lock()).await;
        loop {
            let measured = self.measured.notified();
            match attempt().await? {
                Ok(placed) => return Ok(placed),
                Err(Refusal::Final(error)) => return Err(error),
                Err(Refusal::Estimated(error)) if first.is_err() || Instant::now() >= end => {
                    return Err(error);
                }
                Err(Refusal::Estimated(_)) => {}
            }
            tokio::time::sleep(TRY).await;
            let _ = tokio::time::timeout_at(end, measured).await;
        }
    }
}

impl State {
    /// The expected use of VMs that are not part of what was measured of a host: private memory,
    /// nominal memory, and their number.
    fn expected(&self, host: &str) -> Expected {
        let mut expected = Expected::default();
        for counts in [&self.reserved, &self.unmeasured] {
            for (template, vms) in counts.on(host) {
                let cost = self.costs.of(template).unwrap_or(vms.cost_bytes);
                let count = u64::from(vms.count);
                let add = |sum: u64, each: u64| sum.saturating_add(each.saturating_mul(count));
                expected.bytes = add(expected.bytes, cost);
                expected.promised_bytes = add(expected.promised_bytes, vms.nominal_bytes);
            }
        }
        expected
    }
}

#[derive(Default)]
struct Expected {
    bytes: u64,
    promised_bytes: u64,
}

impl AdmittedRequest {
    /// Chooses hosts for `count` VMs of `template`, and reserves their memory. The views come without
    /// reservations.
    pub(super) fn place(
        &mut self,
        mut views: Vec<HostView>,
        template: &str,
        need: Need,
        count: u32,
    ) -> std::result::Result<Vec<String>, Refusal> {
        let mut state = self.admission.state();
        // What was measured, for where there is no room by what is estimated.
        let measured = views.iter();
        let measured: Vec<(u64, u64)> = measured
            .map(|view| (view.available_bytes, view.promised_bytes))
            .collect();
        for view in &mut views {
            let expected = state.expected(&view.name);
            view.available_bytes = view.available_bytes.saturating_sub(expected.bytes);
            view.promised_bytes = view.promised_bytes.saturating_add(expected.promised_bytes);
        }
        let chosen = scheduler::place(&mut views, need, count).map_err(|error| {
            for (view, measured) in views.iter_mut().zip(measured) {
                (view.available_bytes, view.promised_bytes) = measured;
            }
            match scheduler::place(&mut views, need, count) {
                Ok(_) => Refusal::Estimated(error),
                Err(_) => Refusal::Final(error),
            }
        })?;
        let hosts: Vec<String> = chosen
            .into_iter()
            .map(|index| views[index].name.clone())
            .collect();
        for host in &hosts {
            state.reserved.add(host, template, need);
            self.reserved.add(host, template, need);
        }
        Ok(hosts)
    }

    /// Adds VMs that this request creates.
    pub(super) fn add_vms(&mut self, ids: impl Iterator<Item = String>) {
        let mut state = self.admission.state();
        for id in ids {
            state.vms.insert(id.clone());
            self.vms.push(id);
        }
    }
}

impl Drop for AdmittedRequest {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        for id in &self.vms {
            state.vms.remove(id);
        }
        state.reserved.subtract(&self.reserved);
        state.unmeasured.merge(&self.reserved);
    }
}
