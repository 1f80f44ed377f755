//! Admission of requests for VMs: how many are in progress, the memory that they have reserved, and
//! the number of forks that a host carries out at a time.
//!
//! A burst of requests is placed in no time, while VMs are created one after the other. So memory
//! that a request was given counts as used until the host was measured with the VMs in it, and each
//! host works on as many forks at a time as it has use for. A request that would have to wait too
//! long is refused and does not hold a place meanwhile.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::RETRY_S;
use crate::scheduler::{self, HostView, Need};
use crate::{Error, ErrorKind, Result};

/// The number of requests that may be in progress, including those that wait for a fork permit.
const REQUESTS: usize = 512;
/// The number of forks that even the smallest host carries out at a time.
const FORKS: usize = 8;

/// All requests for VMs that are in progress.
pub(super) struct Admission {
    requests: Arc<Semaphore>,
    forks: Mutex<HashMap<String, Arc<Semaphore>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The ids of the VMs that are being created.
    vms: HashSet<String>,
    /// Memory for VMs that are being created, in bytes, by host.
    reserved: HashMap<String, u64>,
    /// Memory of VMs that were created since their host was last measured, in bytes, by host.
    unmeasured: HashMap<String, u64>,
}

/// A request that was admitted. It ends when this is dropped.
pub(super) struct AdmittedRequest<'a> {
    admission: &'a Admission,
    vms: Vec<String>,
    reserved: Vec<(String, u64)>,
    _place: OwnedSemaphorePermit,
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            requests: Arc::new(Semaphore::new(REQUESTS)),
            forks: Mutex::default(),
            state: Mutex::default(),
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
    pub(super) fn admit(&self) -> Result<AdmittedRequest<'_>> {
        let place = Arc::clone(&self.requests).try_acquire_owned();
        let place = place.map_err(|_| {
            let message = format!("{REQUESTS} requests for VMs are in progress");
            Error::new(ErrorKind::Busy, message)
                .advise("try again later, or request several VMs at once")
                .retry_after(RETRY_S)
        })?;
        Ok(AdmittedRequest {
            admission: self,
            vms: Vec::new(),
            reserved: Vec::new(),
            _place: place,
        })
    }

    /// The ids of all VMs that are being created.
    pub(super) fn vms_in_creation(&self) -> HashSet<String> {
        self.state().vms.clone()
    }

    /// Records that a host was measured, so that the VMs on it count by what they use.
    pub(super) fn host_measured(&self, host: &str) {
        self.state().unmeasured.remove(host);
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
}

impl AdmittedRequest<'_> {
    /// Chooses hosts for `count` VMs, and reserves their memory. The views come without
    /// reservations.
    pub(super) fn place(
        &mut self,
        views: &mut [HostView],
        need: Need,
        count: u32,
    ) -> Result<Vec<usize>> {
        let mut state = self.admission.state();
        for view in views.iter_mut() {
            let of = |all: &HashMap<String, u64>| all.get(&view.name).copied().unwrap_or(0);
            let taken = of(&state.reserved).saturating_add(of(&state.unmeasured));
            view.available_bytes = view.available_bytes.saturating_sub(taken);
        }
        let chosen = scheduler::place(views, need, count)?;
        for index in &chosen {
            let host = &views[*index].name;
            *state.reserved.entry(host.clone()).or_default() += need.cost_bytes;
            self.reserved.push((host.clone(), need.cost_bytes));
        }
        Ok(chosen)
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

impl Drop for AdmittedRequest<'_> {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        for id in &self.vms {
            state.vms.remove(id);
        }
        for (host, bytes) in self.reserved.drain(..) {
            if let Some(reserved) = state.reserved.get_mut(&host) {
                *reserved = reserved.saturating_sub(bytes);
            }
            *state.unmeasured.entry(host).or_default() += bytes;
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

    fn place<'a>(admission: &'a Admission, count: u32) -> Result<AdmittedRequest<'a>> {
        let need = Need {
            cost_bytes: GIB,
            anywhere: false,
        };
        let mut request = admission.admit()?;
        request.place(&mut views(), need, count)?;
        Ok(request)
    }

    #[test]
    fn a_reservation_holds_until_the_host_is_measured_with_its_vms() {
        let admission = Admission::default();
        // A tenth of ten is kept back, so that there is room for three.
        let first = place(&admission, 2).unwrap();
        let refused = place(&admission, 2).map(drop).unwrap_err();
        assert_eq!(
            (refused.kind, refused.retry_after_s),
            (ErrorKind::Busy, Some(5))
        );
        let second = place(&admission, 1).unwrap();
        // Reservations remain while the host is measured.
        admission.host_measured("a");
        place(&admission, 1).map(drop).unwrap_err();
        drop(first);
        place(&admission, 1).map(drop).unwrap_err();
        admission.host_measured("a");
        drop((place(&admission, 2).unwrap(), second));
    }

    #[test]
    fn vms_are_in_creation_while_their_request_lives() {
        let admission = Admission::default();
        let mut request = admission.admit().unwrap();
        request.add_vms(["x".to_owned()].into_iter());
        assert!(admission.vms_in_creation().contains("x"));
        drop(request);
        assert!(admission.vms_in_creation().is_empty());
    }

    #[test]
    fn a_request_beyond_the_limit_is_told_when_to_try_again() {
        let admission = Admission::default();
        let all: Vec<_> = (0..REQUESTS).map(|_| admission.admit().unwrap()).collect();
        let refused = admission.admit().map(drop).unwrap_err();
        assert_eq!(
            (refused.kind, refused.retry_after_s),
            (ErrorKind::Busy, Some(RETRY_S))
        );
        drop(all);
        admission.admit().unwrap();
    }

    #[tokio::test]
    async fn a_host_has_a_number_of_fork_permits_and_does_not_delay_another() {
        let admission = Admission::default();
        let mut permits = Vec::new();
        for _ in 0..FORKS {
            permits.push(admission.fork_permit("a", 1).await.unwrap());
        }
        let soon = std::time::Duration::from_millis(20);
        let late = tokio::time::timeout(soon, admission.fork_permit("a", 1)).await;
        assert!(late.is_err(), "there was a permit too many");
        drop(admission.fork_permit("b", 1).await.unwrap());
        permits.pop();
        drop(admission.fork_permit("a", 1).await.unwrap());
    }
}
