//! vsock, balloon and entropy device under a stock Linux guest.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod memory;
mod rig;
mod streams;
