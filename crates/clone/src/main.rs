//! The `clone` command: runs, forks and manages VMs on this host.
//!
//! Each command is a file in [`cli`]. It is a client of the VMs' sockets, and of the crates that
//! start VMs (`clone-host`) and keep templates (`clone-template`).
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
