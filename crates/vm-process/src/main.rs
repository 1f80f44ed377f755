//! `clone-vm`: the process of a VM. It contains no more code than serving a hostile guest needs.

use std::process::ExitCode;

use clone_start::invocation::EXIT_START_FAILED;

fn main() -> ExitCode {
    clone_vm_process::main().unwrap_or_else(|| {
        eprintln!("clone-vm is the process of a VM; `clone` and `army` start it");
        ExitCode::from(EXIT_START_FAILED)
    })
}
