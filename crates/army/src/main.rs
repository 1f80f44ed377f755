//! The `army` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    army::cli::main()
}
