//! The host's clock.

/// The time by the host's clock, in milliseconds since 1970.
pub use clone_base::clock::unix_ms as now_ms;
