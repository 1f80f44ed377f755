//! Small chores of programs on Linux, each done in one place: random numbers, the wall clock, files
//! that appear as a whole, and waiting for one descriptor.
//!
//! Nothing here knows what a VM, a template or a guest is. What needs several descriptors, timers
//! or an async runtime is left to its own place.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod clock;
pub mod file;
pub mod random;
pub mod wait;
