//! The `army` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    clone::process::main().unwrap_or_else(army::cli::main)
}
