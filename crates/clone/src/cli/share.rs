//! `clone share`: the directories that VMs share with the host.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clone_api::Client;
use clone_host::runtime::RunningVm;
use clone_start::error::Result;
use serde::Serialize;

use super::Context;
use super::output::table;

/// The time limit for a VM to tell the state of its shares.
const PATIENCE: Duration = Duration::from_millis(500);

/// List the directories that VMs share with the host.
#[derive(Debug, clap::Args)]
pub(super) struct ShareArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the shared directories of a VM, or of all running VMs.
    Ls {
        /// The VM.
        name: Option<String>,
    },
}

/// A shared directory.
#[derive(Serialize)]
struct Row {
    vm: String,
    tag: String,
    path: PathBuf,
    read_only: bool,
    /// Where the guest's agent mounts it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mount: Option<String>,
    /// Why it is not served any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
}

pub(super) fn run(context: &Context, args: &ShareArgs) -> Result<ExitCode> {
    let Command::Ls { name } = &args.command;
    let runtime = context.runtime()?;
    let vms = match name {
        Some(name) => vec![runtime.find(name)?],
        None => runtime.running()?,
    };
    let mut rows = Vec::new();
    for vm in &vms {
        rows.extend(rows_of(vm)?);
    }
    context.output.print(&rows, |rows| text(rows));
    Ok(ExitCode::SUCCESS)
}

fn rows_of(vm: &RunningVm) -> Result<Vec<Row>> {
    let config = vm.dir.config()?;
    if config.shares.is_empty() {
        return Ok(Vec::new());
    }
    // A VM that does not answer has a state that is not known.
    let client = Client::new(vm.dir.control_socket()).with_timeout(PATIENCE);
    let failures = client.info().map(|info| info.share_failures);
    let mut failures = failures.unwrap_or_default();
    let rows = config.shares.into_iter().map(|share| Row {
        vm: vm.dir.name(),
        failure: failures.remove(&share.tag),
        tag: share.tag,
        path: share.path,
        read_only: share.read_only,
        mount: share.mount,
    });
    Ok(rows.collect())
}

fn text(rows: &[Row]) -> String {
    let head = ["VM", "TAG", "DIRECTORY", "ACCESS", "STATE"].map(str::to_owned);
    let rows = rows.iter().map(|row| {
        vec![
            row.vm.clone(),
            row.tag.clone(),
            row.path.display().to_string(),
            if row.read_only { "ro" } else { "rw" }.to_owned(),
            row.failure.clone().unwrap_or_else(|| "served".to_owned()),
        ]
    });
    table(
        &std::iter::once(head.to_vec())
            .chain(rows)
            .collect::<Vec<_>>(),
    )
}
