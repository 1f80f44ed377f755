//! The `clone` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    clone::process::main().unwrap_or_else(clone::cli::main)
}
