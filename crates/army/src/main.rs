//! The `army` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The process of a VM: forks start it from the program that forks.
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == "vm-process")
        && let Some(dir) = words.next()
    {
        return clone::process::main(dir.into());
    }
    army::cli::main()
}
