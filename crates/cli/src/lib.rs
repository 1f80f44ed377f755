//! What the command lines of `clone` and `army` have in common.
//!
//! - [`generate`]: completions and manual pages of a command.
//! - [`log`]: the log of a command.
//! - [`FileSink`]: a local file that bytes from elsewhere are written into.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod file_sink;
pub mod generate;
pub mod log;

pub use file_sink::FileSink;
