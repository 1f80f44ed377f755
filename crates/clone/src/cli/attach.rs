//! `clone attach`: goes to a VM's serial console.

use std::process::ExitCode;

use clone_start::error::Result;

use super::Context;
use super::tty_console::{self, End};

/// Attach to a VM's serial console.
///
/// On a terminal, Ctrl-] detaches. The latest output is shown first. Several clients may be
/// attached at once; all see the same output.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM.
    name: String,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let vm = context.runtime()?.find(&args.name)?;
    let end = tty_console::attach(&vm.dir)?;
    context.output.note(match end {
        End::Left => "\n[clone: left the console; the VM runs on]",
        End::Closed => "\n[clone: the VM has ended]",
    });
    Ok(ExitCode::SUCCESS)
}
