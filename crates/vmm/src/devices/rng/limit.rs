//! A token bucket, with a number of bytes per interval and no more than that at once.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// The rate at which a guest may draw random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// The bytes per `interval`.
    pub bytes: NonZeroU32,
    /// The interval. Zero means no limit.
    pub interval: Duration,
}

/// The bytes that a guest may still draw under a [`RateLimit`].
#[derive(Debug)]
pub(super) struct Bucket {
    limit: RateLimit,
    level: u64,
    /// The time up to which `level` has been topped up.
    since: Instant,
}

impl Bucket {
    pub(super) fn full(limit: RateLimit, now: Instant) -> Self {
        Self {
            limit,
            level: u64::from(limit.bytes.get()),
            since: now,
        }
    }

    /// Takes up to `want` bytes, or returns the time until there are some.
    pub(super) fn take(&mut self, want: u64, now: Instant) -> Result<u64, Duration> {
        self.top_up(now);
        if self.level == 0 {
            // The wait is a sixteenth of the interval, so that small draws do not cost a timer
            // each.
            return Err(self.limit.interval / 16);
        }
        let granted = want.min(self.level);
        self.level -= granted;
        Ok(granted)
    }

    fn top_up(&mut self, now: Instant) {
        let size = u64::from(self.limit.bytes.get());
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= self.limit.interval {
            self.level = size;
            self.since = now;
            return;
        }
        // The time is below the interval, so the quotient is below `size`.
        let interval = self.limit.interval.as_nanos();
        let earned = elapsed.as_nanos() * u128::from(size) / interval;
        if earned > 0 {
            self.level = (self.level + earned as u64).min(size);
            let spent = (earned * interval).div_ceil(u128::from(size));
            self.since += Duration::from_nanos(spent as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_pattern_of_draws_beats_the_limit(
            bytes in 1_u32..100_000,
            draws in prop::collection::vec((0_u64..5_000, 1_u64..200_000), 1..200),
        ) {
            let interval = Duration::from_millis(100);
            let start = Instant::now();
            let limit = RateLimit { bytes: NonZeroU32::new(bytes).unwrap(), interval };
            let mut bucket = Bucket::full(limit, start);
            let (mut now, mut total) = (start, 0_u64);
            for (step_us, want) in draws {
                now += Duration::from_micros(step_us);
                total += bucket.take(want, now).unwrap_or(0);
            }
            let share = (now - start).as_secs_f64() / interval.as_secs_f64();
            prop_assert!(total as f64 <= f64::from(bytes) * (1.0 + share) + 1.0);
        }
    }

    #[test]
    fn an_empty_bucket_fills_with_time() {
        let limit = RateLimit {
            bytes: NonZeroU32::new(1000).unwrap(),
            interval: Duration::from_secs(1),
        };
        let start = Instant::now();
        let mut bucket = Bucket::full(limit, start);
        assert_eq!(bucket.take(5000, start), Ok(1000));
        assert!(bucket.take(1, start).is_err());
        let later = start + Duration::from_millis(500);
        assert_eq!(bucket.take(5000, later), Ok(500));
    }
}
