//! The time for which a CPU waits while the host lacks memory.
//!
//! The first `KVM_RUN` of a vCPU has KVM allocate, and on a host where many VMs start at once it
//! may answer ENOMEM though there will be memory in a moment. A VM must not end for that, and must
//! not wait for ever where there will be no memory.

use std::time::{Duration, Instant};

/// The pause before the guest is entered again.
pub(super) const PAUSE: Duration = Duration::from_millis(10);
/// A CPU that could not be entered for this long ends its machine.
const LIMIT: Duration = Duration::from_secs(5);

/// The time since which the host has had no memory for a CPU, or `None` while it has memory.
#[derive(Debug, Default)]
pub(super) struct MemoryShortage {
    since: Option<Instant>,
}

impl MemoryShortage {
    /// The host had no memory (again). Returns whether it is worth trying once more.
    pub(super) fn is_worth_waiting(&mut self) -> bool {
        self.is_worth_waiting_at(Instant::now())
    }

    fn is_worth_waiting_at(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        now.duration_since(since) < LIMIT
    }

    /// The guest was entered.
    pub(super) fn is_over(&mut self) {
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_waited_for_and_not_for_ever() {
        let (mut shortage, start) = (MemoryShortage::default(), Instant::now());
        for waited in [Duration::ZERO, LIMIT / 2, LIMIT - PAUSE] {
            assert!(shortage.is_worth_waiting_at(start + waited));
        }
        assert!(!shortage.is_worth_waiting_at(start + LIMIT));
    }

    #[test]
    fn each_shortage_has_its_own_time() {
        let (mut shortage, start) = (MemoryShortage::default(), Instant::now());
        assert!(shortage.is_worth_waiting_at(start));
        shortage.is_over();
        assert!(shortage.is_worth_waiting_at(start + LIMIT));
    }
}
