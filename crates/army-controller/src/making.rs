//! VMs that are being made: who they are, what memory they were promised, and whose turn it is.
//!
//! A burst of requests is placed in no time, while the VMs come one after the other: what a host was
//! promised counts until they are there, and each host makes so many at a time as it has use for.
//! Whoever has to wait too long is told to come back, and does not hold a place meanwhile.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use army_api::{Problem, ProblemKind};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::scheduler::{self, HostView, Need};
use crate::store::Result;

/// Requests that are worked on at once; those that wait for their turn among them.
const REQUESTS: usize = 512;
/// When it is worth trying again, in seconds.
const RETRY_S: u32 = 5;
/// Requests for one host that are worked on at its node at once, however small it is.
const TURNS: usize = 8;

/// All that is being made.
pub(super) struct Making {
    requests: Arc<Semaphore>,
    turns: Mutex<HashMap<String, Arc<Semaphore>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    vms: HashSet<String>,
    /// Memory of VMs on their way, by host.
    promised: HashMap<String, u64>,
    /// Memory of those that came since the host was last measured.
    arrived: HashMap<String, u64>,
}

/// A request that is worked on.
pub(super) struct Request<'a> {
    making: &'a Making,
    vms: Vec<String>,
    promised: Vec<(String, u64)>,
    _place: OwnedSemaphorePermit,
}

impl Default for Making {
    fn default() -> Self {
        Self {
            requests: Arc::new(Semaphore::new(REQUESTS)),
            turns: Mutex::default(),
            state: Mutex::default(),
        }
    }
}

impl Making {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up a request.
    ///
    /// # Errors
    /// [`ProblemKind::Busy`] where too many are worked on.
    pub(super) fn request(&self) -> Result<Request<'_>> {
        let place = Arc::clone(&self.requests).try_acquire_owned();
        let place = place.map_err(|_| {
            let detail = format!("{REQUESTS} requests for VMs are in progress");
            Problem::new(ProblemKind::Busy, detail)
                .advise("try again later, or request several VMs at once")
                .retry_after(RETRY_S)
        })?;
        Ok(Request {
            making: self,
            vms: Vec::new(),
            promised: Vec::new(),
            _place: place,
        })
    }

    /// All VMs that are being made.
    pub(super) fn vms(&self) -> HashSet<String> {
        self.state().vms.clone()
    }

    /// A host was measured: what is there counts by what it is.
    pub(super) fn measured(&self, host: &str) {
        self.state().arrived.remove(host);
    }

    /// Waits for a turn at a host, which has so many processors.
    pub(super) async fn turn(&self, host: &str, cpus: u32) -> Option<OwnedSemaphorePermit> {
        let turns = {
            let mut all = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            let turns = all.entry(host.to_owned()).or_insert_with(|| {
                // Half of making a VM is waiting for the kernel.
                Arc::new(Semaphore::new(TURNS.max(2 * cpus as usize)))
            });
            Arc::clone(turns)
        };
        // It is never closed.
        turns.acquire_owned().await.ok()
    }
}

impl Request<'_> {
    /// Chooses hosts for `count` VMs, and promises them the memory; views come without promises.
    pub(super) fn place(
        &mut self,
        views: &mut [HostView],
        need: Need,
        count: u32,
    ) -> Result<Vec<usize>> {
        let mut state = self.making.state();
        for view in views.iter_mut() {
            let of = |all: &HashMap<String, u64>| all.get(&view.name).copied().unwrap_or(0);
            let taken = of(&state.promised).saturating_add(of(&state.arrived));
            view.available_bytes = view.available_bytes.saturating_sub(taken);
        }
        let chosen = scheduler::place(views, need, count)?;
        for index in &chosen {
            let host = &views[*index].name;
            *state.promised.entry(host.clone()).or_default() += need.cost_bytes;
            self.promised.push((host.clone(), need.cost_bytes));
        }
        Ok(chosen)
    }

    /// Says which VMs they are.
    pub(super) fn name(&mut self, ids: impl Iterator<Item = String>) {
        let mut state = self.making.state();
        for id in ids {
            state.vms.insert(id.clone());
            self.vms.push(id);
        }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let mut state = self.making.state();
        for id in &self.vms {
            state.vms.remove(id);
        }
        for (host, bytes) in self.promised.drain(..) {
            if let Some(promised) = state.promised.get_mut(&host) {
                *promised = promised.saturating_sub(bytes);
            }
            *state.arrived.entry(host).or_default() += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn views() -> [HostView; 1] {
        [HostView {
            name: "a".into(),
            open: true,
            suits: true,
            cpus: 1,
            memory_bytes: 10 * GIB,
            available_bytes: 4 * GIB,
            has_template: true,
            ..HostView::default()
        }]
    }

    fn place<'a>(making: &'a Making, count: u32) -> Result<Request<'a>> {
        let need = Need {
            cost_bytes: GIB,
            anywhere: false,
        };
        let mut request = making.request()?;
        request.place(&mut views(), need, count)?;
        Ok(request)
    }

    #[test]
    fn a_promise_holds_until_what_came_of_it_is_measured() {
        let making = Making::default();
        // A tenth of ten is kept back, so that there is room for three.
        let first = place(&making, 2).unwrap();
        let refused = place(&making, 2).map(drop).unwrap_err();
        assert_eq!((refused.status, refused.retry_after_s), (429, Some(5)));
        let second = place(&making, 1).unwrap();
        // While the host goes on to be measured.
        making.measured("a");
        place(&making, 1).map(drop).unwrap_err();
        drop(first);
        place(&making, 1).map(drop).unwrap_err();
        making.measured("a");
        drop((place(&making, 2).unwrap(), second));
    }

    #[test]
    fn vms_are_being_made_while_their_request_lives() {
        let making = Making::default();
        let mut request = making.request().unwrap();
        request.name(["x".to_owned()].into_iter());
        assert!(making.vms().contains("x"));
        drop(request);
        assert!(making.vms().is_empty());
    }

    #[test]
    fn who_comes_when_too_many_are_there_is_told_to_come_back() {
        let making = Making::default();
        let all: Vec<_> = (0..REQUESTS).map(|_| making.request().unwrap()).collect();
        let refused = making.request().map(drop).unwrap_err();
        assert_eq!(
            (refused.status, refused.retry_after_s),
            (429, Some(RETRY_S))
        );
        drop(all);
        making.request().unwrap();
    }

    #[tokio::test]
    async fn a_host_makes_so_many_at_a_time_and_another_is_not_kept_waiting() {
        let making = Making::default();
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            turns.push(making.turn("a", 1).await.unwrap());
        }
        let soon = std::time::Duration::from_millis(20);
        let late = tokio::time::timeout(soon, making.turn("a", 1)).await;
        assert!(late.is_err(), "there was a turn too many");
        drop(making.turn("b", 1).await.unwrap());
        turns.pop();
        drop(making.turn("a", 1).await.unwrap());
    }
}
