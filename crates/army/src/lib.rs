//! The `army` command: its server and its client.
//!
//! - [`server`]: the REST API and the dashboard.
//! - [`controller`]: what the API asks for, done.
//! - [`scheduler`]: which host a VM goes to.
//! - [`cluster`]: how controller and nodes of several hosts trust each other.
//! - [`store`]: what the controller remembers.
//! - [`node`]: the VMs of one host.
//! - [`cli`]: the commands; all but `army dev` are clients of the API.
//!
//! It is a library only so that tests reach its parts.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cli;
pub mod cluster;
pub mod controller;
mod guest;
pub mod node;
mod pipe;
mod random;
pub mod scheduler;
pub mod server;
pub mod store;

use army_api::{Problem, ProblemKind};

/// Does what blocks on a thread for such.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(Problem::new(
                ProblemKind::Internal,
                format!("a task failed: {error}"),
            ))
        })
}
