//! The host's clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// The time by the host's clock, in milliseconds since 1970.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_millis() as u64)
}
