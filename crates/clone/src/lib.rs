//! The parts of the `clone` command that other programs and tests reach too.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod host_net;
