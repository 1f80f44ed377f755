//! The program `clone-share`: the jailed server of one directory that a guest shares with its host.

use std::process::ExitCode;

fn main() -> ExitCode {
    clone_share::main()
}
