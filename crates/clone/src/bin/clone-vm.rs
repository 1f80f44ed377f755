//! The process of a VM as a program of its own. What serves hostile guests has no more code in it
//! than it needs, starts sooner than the whole of `clone` or `army`, and takes less memory.

use std::process::ExitCode;

fn main() -> ExitCode {
    clone::process::main().unwrap_or_else(|| {
        eprintln!("clone-vm is the process of a VM; `clone` and `army` start it");
        ExitCode::from(clone::process::EXIT_START_FAILED)
    })
}
