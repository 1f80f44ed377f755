//! The bound of the work that one call does for a guest's queue.
//!
//! One thread serves all devices and the control socket of a VM. A queue that has spent its budget
//! is requeued, so that it is served again after others had their turn. The time that requests cost
//! depends on their number and their bytes, so a budget counts both.

/// The work that a call may still do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    requests: usize,
    bytes: u64,
}

impl Budget {
    /// A budget of `requests` requests with `bytes` bytes in all of them. The request that exceeds
    /// the bytes is the last one.
    pub const fn new(requests: usize, bytes: u64) -> Self {
        Self { requests, bytes }
    }

    /// Whether the call must end and be requeued.
    pub fn is_spent(&self) -> bool {
        self.requests == 0 || self.bytes == 0
    }

    /// Counts a request of `bytes`, or a look at the queue that found no request.
    pub fn spend(&mut self, bytes: u64) {
        self.requests = self.requests.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_spent_by_many_requests_or_by_large_ones() {
        let mut many = Budget::new(3, 100);
        let mut large = many;
        for _ in 0..3 {
            assert!(!many.is_spent());
            many.spend(0);
        }
        assert!(many.is_spent());
        large.spend(u64::MAX);
        assert!(large.is_spent());
    }
}
