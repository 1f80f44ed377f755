//! The time at which a machine's guest first ran, at which the duration of a start or a fork ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared by all CPUs of a machine; the first that enters the guest sets it, once.
#[derive(Clone, Debug, Default)]
pub struct EntryTime(Arc<AtomicU64>);

impl EntryTime {
    /// The time at which the first CPU entered the guest, in nanoseconds of the host's
    /// `CLOCK_MONOTONIC`, or `None` before that.
    pub fn monotonic_ns(&self) -> Option<u64> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            time => Some(time),
        }
    }

    /// Records that a CPU is about to enter the guest. This costs one load when a time was recorded
    /// before.
    pub(super) fn note(&self) {
        if self.0.load(Ordering::Relaxed) == 0 {
            // Another CPU may be first in this moment; its time is as good.
            let _ =
                self.0
                    .compare_exchange(0, monotonic_ns(), Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// The present time in nanoseconds of the host's `CLOCK_MONOTONIC`, which all processes share.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_entry_is_noted() {
        let entry = EntryTime::default();
        assert_eq!(entry.monotonic_ns(), None);
        let before = monotonic_ns();
        entry.clone().note();
        let noted = entry.monotonic_ns().unwrap();
        assert!((before..=monotonic_ns()).contains(&noted));
        entry.note();
        assert_eq!(entry.monotonic_ns(), Some(noted));
    }
}
