//! The contract between Army's controller and its nodes.
//!
//! [`NodeApi`] is what a controller asks of a node. [`Remote`] asks it of a node on another host,
//! over mutual TLS between the members of a [`cluster`]; [`router`] is the other end of that
//! connection. [`requests`] has the types that travel, and [`Error`] what can go wrong. [`serve`]
//! accepts the connections of all of Army's servers, also those of the REST API.
//!
//! This crate does not depend on how a node runs VMs, nor on how a controller decides.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod agent;
mod api;
mod call;
pub mod chunks;
pub mod cluster;
mod error;
mod moves;
mod relay;
pub mod remote;
pub mod requests;
pub mod router;
pub mod serve;
pub mod simulated;
mod tickets;
pub mod time;
pub mod validate;

pub use agent::AgentStream;
pub use agent_proto::deadline::Deadline;
pub use api::{NodeApi, Reply};
pub use call::{Call, Fence};
pub use error::{Error, ErrorKind, Result};
pub use moves::{ByteStream, carry};
pub use remote::Remote;

/// The version of the protocol between controller and node: the first part of every path. It
/// changes when a request of one side cannot be read by the other side any more.
pub const VERSION: &str = "v2";

/// The protocol that a connection to an agent is upgraded to: from then on it is the agent's own.
const AGENT_PROTOCOL: &str = "army-agent";

/// The protocol that a connection to a node is upgraded to for a VM that moves: from then on it is what
/// the launchers and processes of both hosts say.
const MOVE_PROTOCOL: &str = "army-move";

/// The header with the host's epoch, as the caller knows it.
const EPOCH_HEADER: &str = "army-epoch";

/// The header with the time that remains until a call's deadline, in milliseconds.
const DEADLINE_HEADER: &str = "army-deadline-ms";
