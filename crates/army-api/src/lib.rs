//! The request and response types of Army's REST API, and a client of it.
//!
//! There is one module for each kind of resource. Each type is a schema of the API's OpenAPI
//! document, and its doc comments are the descriptions there. Sizes are in bytes, times are in
//! milliseconds since 1970, and durations are in the unit that the field's name ends with. This
//! crate does not depend on the server.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod builds;
pub mod changes;
pub mod checkpoints;
pub mod client;
pub mod events;
pub mod exec;
pub mod figures;
pub mod files;
pub mod hosts;
pub mod keys;
mod limits;
pub mod moves;
pub mod operations;
pub mod problem;
pub mod streams;
pub mod templates;
pub mod tenants;
pub mod vms;
pub mod webhooks;

pub use client::Client;
pub use problem::{Problem, ProblemKind};
