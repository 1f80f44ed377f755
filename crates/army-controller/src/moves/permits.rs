//! How many VMs leave or reach a host at a time. More would share its network, and take longer each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The number of VMs that are moved to or from one host at a time.
pub(super) const MOVES: usize = 2;

/// The permits of all hosts.
#[derive(Default)]
pub(crate) struct MovePermits(Mutex<HashMap<String, Arc<Semaphore>>>);

impl MovePermits {
    /// Waits until a VM may be moved between two hosts, for as long as the permits are held.
    pub(super) async fn take(&self, from: &str, to: &str) -> Vec<OwnedSemaphorePermit> {
        let mut hosts = [from, to];
        // In one order everywhere, so that nobody waits in a circle.
        hosts.sort_unstable();
        let mut permits = Vec::with_capacity(hosts.len());
        for host in hosts {
            // The semaphore is never closed.
            permits.extend(self.of_host(host).acquire_owned().await.ok());
        }
        permits
    }

    fn of_host(&self, host: &str) -> Arc<Semaphore> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Hosts that nothing is moved to or from need none.
        all.retain(|_, permits| {
            Arc::strong_count(permits) > 1 || permits.available_permits() < MOVES
        });
        let permits = all.entry(host.to_owned());
        Arc::clone(permits.or_insert_with(|| Arc::new(Semaphore::new(MOVES))))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_host_has_so_many_moves_at_a_time_and_others_are_not_delayed() {
        let permits = MovePermits::default();
        let first = permits.take("a", "b").await;
        let _second = permits.take("c", "a").await;
        let soon = Duration::from_millis(20);
        let third = tokio::time::timeout(soon, permits.take("a", "d")).await;
        assert!(third.is_err());
        permits.take("d", "e").await;
        drop(first);
        permits.take("a", "d").await;
    }
}
