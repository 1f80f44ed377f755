//! The contract between Army's controller and its nodes.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cluster;
mod failure;
pub mod host;
pub mod pipe;
pub mod policy;
pub mod remote;
pub mod time;
pub mod types;

pub use failure::{Failure, answer};
pub use types::*;

use agent_proto::client::ClientError;
use army_api::{Problem, ProblemKind};

/// A result with a problem to tell the client.
pub type Result<T> = std::result::Result<T, Problem>;

/// What a connection to an agent upgrades to: from then on it is the agent's protocol.
pub const AGENT_PROTOCOL: &str = "army-agent";

/// Does what blocks on a thread for such.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(Problem::new(
                ProblemKind::Internal,
                format!("a task failed: {error}"),
            ))
        })
}

/// A name, and never a path: clients do not choose where on the host we look.
pub fn check_template_name(name: &str) -> Result<()> {
    if clone_api::validate::is_valid_name(name) {
        return Ok(());
    }
    let detail = format!("invalid template name `{}`", name.escape_debug());
    Err(Problem::new(ProblemKind::InvalidRequest, detail))
}

/// What went wrong at a guest's agent.
pub fn of_agent(error: &ClientError) -> Problem {
    use agent_proto::messages::ErrorCode as Agent;
    let kind = match error {
        ClientError::Refused(refused) => match refused.code() {
            Agent::Invalid | Agent::Unsupported => ProblemKind::InvalidRequest,
            Agent::NotFound => ProblemKind::NotFound,
            Agent::Denied => ProblemKind::Forbidden,
            Agent::Exhausted => ProblemKind::Busy,
            Agent::Other => ProblemKind::GuestUnavailable,
        },
        ClientError::TooLong { .. } => ProblemKind::InvalidRequest,
        _ => ProblemKind::GuestUnavailable,
    };
    Problem::new(kind, error.to_string())
}
