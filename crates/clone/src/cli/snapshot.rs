//! `clone snapshot`: makes a template of a running VM.

use std::process::ExitCode;

use clone_api::control::SnapshotTimes;
use clone_host::snapshot;
use clone_start::error::Result;
use clone_template::Store;
use serde::Serialize;

use super::Context;
use super::output::human_bytes;

/// Make a template of a running VM, which continues to run.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM.
    name: String,
    /// The template to make: a name in the store, or a path with a `/`.
    #[arg(long, short)]
    output: String,
    /// Store only the changes since the template that the VM was forked from, or since its last
    /// snapshot; the other data is shared with that template or snapshot.
    #[arg(long)]
    diff: bool,
}

/// The output of `clone snapshot --json`.
#[derive(Serialize)]
struct Taken {
    id: String,
    path: String,
    parent: Option<String>,
    memory_bytes: u64,
    times: SnapshotTimes,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let runtime = context.runtime()?;
    let vm = runtime.find(&args.name)?;
    let target = Store::from_env()?.path(&args.output)?;
    let (template, taken) = snapshot::take(&runtime, &vm, &target, args.diff)?;
    let taken = Taken {
        id: template.manifest().id.clone(),
        path: template.dir().display().to_string(),
        parent: template.content().parent.clone(),
        memory_bytes: taken.memory_bytes,
        times: taken.times,
    };
    context.output.print(&taken, |taken| {
        format!(
            "{}: {} of memory; the guest was paused for {:.1} ms",
            taken.path,
            human_bytes(taken.memory_bytes),
            taken.times.pause_us as f64 / 1000.0
        )
    });
    Ok(ExitCode::SUCCESS)
}
