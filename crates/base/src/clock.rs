//! The wall clock, which somebody may set at any time. Durations are measured with
//! [`Instant`](std::time::Instant).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The time since 1970 in UTC; zero where the clock is set to an earlier time.
pub fn since_1970() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// The time since 1970 in UTC, in milliseconds.
pub fn unix_ms() -> u64 {
    u64::try_from(since_1970().as_millis()).unwrap_or(u64::MAX)
}

/// The time since 1970 in UTC, in nanoseconds.
pub fn unix_ns() -> u64 {
    u64::try_from(since_1970().as_nanos()).unwrap_or(u64::MAX)
}
