//! A running VM as a stream: the records in which its memory, its disks' blocks and its machine's
//! state travel from one host's VM process to another's, and the words by which exactly one of the
//! two goes on to run it.
//!
//! - [`wire`]: the records and replies as bytes, without I/O.
//! - [`Outgoing`]: the source's end. It sends pages as often as they change.
//! - [`receive`]: the destination's end, for which the stream is a stranger's.
//! - [`Link`]: a pair of descriptors with a limit to the time without progress.
//!
//! # The end of a migration
//! The source pauses its guest and sends the rest, then [`wire::Record::Done`]. The destination
//! answers [`wire::Reply::Ready`] when it has everything and could run it. Only then does the source
//! give up its right to run, and says [`wire::Record::Go`]. The destination runs, and answers
//! [`wire::Reply::Running`]. Before `Go`, the VM is the source's, whatever happens. After it, the VM
//! is the destination's, unless the destination answers [`wire::Reply::Failed`], by which it
//! promises that it has discarded the VM.
//!
//! What a VM is, whether the destination has its template, and how the bytes get from host to host
//! is decided elsewhere (`clone-host`); which pages have changed, and the pause, by the VM's process.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod incoming;
mod link;
mod outgoing;
mod sent_pages;
pub mod wire;

pub use incoming::{Blocks, Received, receive};
pub use link::Link;
pub use outgoing::{Outgoing, Sent};

/// The errors of a migration's stream.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The stream broke, or made no progress for too long.
    #[error("the connection to the other host failed: cannot {what}: {source}")]
    Stream {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The other side does not follow the format.
    #[error("the other host sent what cannot be: {0}")]
    Wire(#[from] wire::WireError),
    /// The other side gave up, and said why.
    #[error("the other host gave up: {0}")]
    Refused(String),
    /// Guest memory could not be read or written.
    #[error("cannot {what} guest memory: {reason}")]
    Memory {
        /// What was tried.
        what: &'static str,
        /// The reason.
        reason: String,
    },
    /// A disk could not be read or written.
    #[error("cannot {what} disk {disk}: {source}")]
    Disk {
        /// What was tried.
        what: &'static str,
        /// The disk's number in the description.
        disk: u32,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl MigrationError {
    fn stream(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Stream { what, source }
    }
}
