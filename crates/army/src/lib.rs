//! The `army` command: its server and its client.
//!
//! - [`server`]: the REST API and the dashboard.
//! - [`enrol`]: how a host joins, on both sides.
//! - [`webhooks`]: sending events to URLs.
//! - [`cli`]: the commands; all but the servers are clients of the API.
//!
//! It is a library only so that tests reach its parts.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cli;
pub mod enrol;
pub mod server;
pub mod webhooks;
