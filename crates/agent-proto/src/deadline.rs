//! The bounds of every exchange with a guest: a point in time, and a number of bytes.

use std::time::{Duration, Instant};

/// The latest deadline. No caller waits longer than this.
const FARTHEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// The point in time at which an exchange must have ended, no matter how its peer spreads out its
/// bytes. No value means "never".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline `limit` from now, at most a year.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit.min(FARTHEST))
    }

    /// The time that remains; `None` once the deadline has passed.
    pub fn remaining(self) -> Option<Duration> {
        let remaining = self.0.saturating_duration_since(Instant::now());
        (!remaining.is_zero()).then_some(remaining)
    }

    /// Returns a deadline that is later by `by`, at most a year from now.
    #[must_use]
    pub fn extended(self, by: Duration) -> Self {
        let farthest = Self::after(FARTHEST);
        self.0
            .checked_add(by)
            .map_or(farthest, |at| Self(at).min(farthest))
    }
}

/// The most bytes that are collected from a guest. No value means "any number".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteLimit(u64);

impl ByteLimit {
    /// The largest limit: 1 TiB.
    const LARGEST: u64 = 1 << 40;

    /// A limit of `bytes`, at most 1 TiB.
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
