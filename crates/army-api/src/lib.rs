//! What Army's REST API speaks of, and a client of it.
//!
//! One module per kind of thing; each type here is a schema of the API's OpenAPI document. Sizes are
//! in bytes, times in milliseconds since 1970, durations in the unit that their name ends with.
//! How the server does what is asked for is not known here.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod builds;
pub mod client;
pub mod events;
pub mod exec;
pub mod hosts;
pub mod keys;
pub mod problem;
pub mod templates;
pub mod vms;

pub use client::Client;
pub use problem::{Problem, ProblemKind};
