//! The errors of operations on a guest's agent.

use std::io;

use crate::frame::FrameError;

/// The error of an operation.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VM's socket cannot be reached.
    #[error("cannot reach the VM's vsock socket {path}: {source}")]
    Connect {
        /// The socket.
        path: String,
        /// The host's error.
        source: io::Error,
    },
    /// No agent listens in the guest.
    #[error("no agent answers in the guest: it is still starting, or it is not in its image")]
    NoAgent,
    /// The connection was lost; the guest may have ended.
    #[error("the connection to the agent was lost: {0}")]
    Lost(#[source] io::Error),
    /// The deadline passed before the agent had answered.
    #[error("the guest's agent did not answer in time")]
    Late,
    /// The agent sent more than the caller's limit.
    #[error("the guest sent more than {0}, the most that is collected")]
    TooMuch(String),
    /// The agent sent bytes that do not follow the protocol.
    #[error("the agent cannot be understood: {0}")]
    Garbled(#[from] FrameError),
    /// The agent sent a message that does not belong to the operation.
    #[error("the agent's answer does not belong to what it was asked")]
    OutOfTurn,
    /// The request is longer than the agent accepts.
    #[error(
        "the command's arguments and environment are too long: {len} bytes, and the guest's agent takes {max}"
    )]
    TooLong {
        /// The length of the request.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The agent refused. Its message is printable.
    #[error("{}", .0.message)]
    Refused(crate::messages::Error),
    /// A local file or stream failed.
    #[error("cannot read or write the data locally: {0}")]
    Local(#[source] io::Error),
}
