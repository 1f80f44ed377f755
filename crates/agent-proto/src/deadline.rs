//! Bounds that every exchange with a guest has: a point in time, and a number of bytes.

use std::time::{Duration, Instant};

/// The farthest deadline. A longer limit means the same to anybody who waits for it.
const FARTHEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// The point in time by which an exchange must be over, however its peer spreads out its bytes.
/// There is no value that means "never".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// `limit` from now, and a year at the most.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit.min(FARTHEST))
    }

    /// The time that remains; `None` once the deadline has passed.
    pub fn remaining(self) -> Option<Duration> {
        let remaining = self.0.saturating_duration_since(Instant::now());
        (!remaining.is_zero()).then_some(remaining)
    }

    /// The same deadline, later by `by`, and at most a year from now.
    #[must_use]
    pub fn extended(self, by: Duration) -> Self {
        let farthest = Self::after(FARTHEST);
        self.0
            .checked_add(by)
            .map_or(farthest, |at| Self(at).min(farthest))
    }
}

/// The most bytes that are collected from a guest. There is no value that means "any number".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteLimit(u64);

impl ByteLimit {
    /// The largest limit: 1 TiB.
    const LARGEST: u64 = 1 << 40;

    /// A limit of `bytes`, and 1 TiB at the most.
    pub const fn new(bytes: u64) -> Self {
        Self(if bytes < Self::LARGEST {
            bytes
        } else {
            Self::LARGEST
        })
    }

    /// The limit in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_is_beyond_the_farthest() {
        let far = Deadline::after(Duration::MAX);
        assert!(far.remaining().unwrap() <= FARTHEST);
        assert!(far.extended(Duration::MAX).remaining().unwrap() <= FARTHEST);
        assert_eq!(ByteLimit::new(u64::MAX).bytes(), ByteLimit::LARGEST);
    }

    #[test]
    fn a_deadline_that_has_passed_has_no_time_remaining() {
        let passed = Deadline::after(Duration::ZERO);
        assert_eq!(passed.remaining(), None);
        let extended = passed.extended(Duration::from_secs(60));
        assert!(extended.remaining().unwrap() > Duration::from_secs(50));
    }
}
