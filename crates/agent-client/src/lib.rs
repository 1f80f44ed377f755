//! The client of the guest's agent for tokio, over the same codec and by the same rules as the
//! blocking client of `agent-proto`.
//!
//! A [`Connection`] carries one request. What comes of it is one value that owns the connection:
//! [`Running`] a command, [`Tunnel`] a connection to a port, [`Download`] and [`Upload`] a file.
//! Dropping it, or the future that makes it, closes the connection, and the agent then ends what
//! the request has started.
//!
//! Nothing here spawns a task or holds a thread. Bytes move only while a future of the value is
//! awaited, and all of these futures can be dropped and called again without losing anything. One
//! message at most waits to be sent, and one message at most is received ahead of its reader, so
//! that a slow side makes the other one wait.
//!
//! Every exchange has an absolute deadline from its first system call on, and every call that
//! collects output has a limit.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod connection;
mod directory;
mod file;
mod input;
mod running;
mod socket;
#[cfg(test)]
mod tests;
mod tunnel;
mod wire;

pub use agent_proto::deadline::{ByteLimit, Deadline};
pub use agent_proto::error::ClientError;
pub use agent_proto::exec::Event;

pub use agent_proto::exec::Collected;
pub use connection::Connection;
pub use directory::FileWatch;
pub use file::{Download, Upload};
pub use running::Running;
pub use socket::{AgentSocket, Transport};
pub use tunnel::Tunnel;

type Result<T> = std::result::Result<T, ClientError>;
