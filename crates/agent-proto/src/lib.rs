//! The protocol between hosts and guest agents.
//!
//! A connection (vsock, port [`PORT`]) carries one operation. The agent speaks first
//! ([`messages::Hello`]); the host sends one [`messages::Request`], and what follows depends on it.
//! The protocol only grows: a template may hold an agent that is years older than its host, so
//! fields and operations are added and never changed, an agent answers what it does not know with
//! an error, and both sides skip fields that they do not know.
//!
//! A guest is a stranger to its host. What it sends has a bound ([`deadline`]), and its text is
//! made printable where it comes in ([`incoming`]).
//!
//! - [`messages`]: the messages, as protobuf.
//! - [`frame`], [`incoming`], [`exec`]: the codec, without I/O.
//! - [`exchange`]: the rules of an exchange, without I/O.
//! - [`client`]: the host's side with blocking I/O. The crate `agent-client` has it for tokio.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod client;
pub mod deadline;
pub mod error;
pub mod exchange;
pub mod exec;
pub mod frame;
pub mod incoming;
pub mod messages;
pub mod text;

/// The vsock port that the agent listens on.
pub const PORT: u32 = 1024;

/// The version that [`messages::Hello`] tells. It changes only if an old host could no longer talk
/// to a new agent at all, which the rules above are there to avoid.
pub const PROTOCOL: u32 = 1;

/// The most output per stream that an agent keeps until the host acknowledges it (bytes).
pub const OUTPUT_WINDOW: usize = 256 << 10;

/// The most input that a host may send ahead of what the command has taken (bytes).
///
/// With it neither side ever has to stop reading messages, so that input that nobody takes cannot
/// keep acknowledgements of output from arriving.
pub const INPUT_WINDOW: usize = 256 << 10;

/// The most data in one message (bytes).
pub const CHUNK: usize = 64 << 10;
