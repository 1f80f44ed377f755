//! The protocol between hosts and guest agents.
//!
//! A connection (vsock, port [`PORT`]) carries one operation. The agent sends the first message
//! ([`messages::Hello`]); the host sends one [`messages::Request`], which determines the messages
//! that follow. The protocol only grows: a template may contain an agent that is years older than
//! its host, so fields and operations are added and never changed, an agent answers an unknown
//! operation with an error, and both sides skip unknown fields.
//!
//! A guest is not trusted. The time and size of its messages are bounded ([`deadline`]), and its
//! text is made printable on receipt ([`incoming`]).
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
mod file_messages;
pub mod frame;
pub mod incoming;
pub mod messages;
pub mod text;

/// The vsock port that the agent listens on.
pub const PORT: u32 = 1024;

/// The version in [`messages::Hello`]. It would change only if an old host could not talk to a new
/// agent at all, which the rules above avoid.
pub const PROTOCOL: u32 = 1;

/// The most output per stream that an agent keeps until the host acknowledges it (bytes).
pub const OUTPUT_WINDOW: usize = 256 << 10;

/// The most input that a host may send ahead of what the command has read (bytes).
///
/// With this window, neither side ever has to stop reading messages, so input that is not read
/// cannot delay acknowledgements of output.
pub const INPUT_WINDOW: usize = 256 << 10;

/// The most data in one message (bytes).
pub const CHUNK: usize = 64 << 10;
