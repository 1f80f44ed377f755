//! `clone ls`: lists the running and the suspended VMs.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clone_api::control::VmState;
use clone_api::{Client, VmConfig};
use clone_host::runtime::RunningVm;
use clone_host::suspended::SuspendedVm;
use clone_memory::ProcessUsage;
use clone_start::error::Result;
use serde::Serialize;

use super::Context;
use super::output::{human_bytes, table};

/// The time limit for a VM to report its state.
const PATIENCE: Duration = Duration::from_millis(500);
/// The number of VMs that are queried at once.
const ASKERS: usize = 16;

/// List the running and the suspended VMs.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print names only.
    #[arg(long, short)]
    quiet: bool,
    /// Query the state of each VM, too.
    #[arg(long, short)]
    state: bool,
}

#[derive(Serialize)]
struct Row {
    name: String,
    /// The VM's process; absent for a suspended VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_bytes: Option<u64>,
    /// The private memory of the VM's process, as the host's kernel counts it; for a clone, the
    /// pages that it changed, and the little that the VMM itself uses.
    #[serde(flatten)]
    usage: Option<Usage>,
    /// Whether the VM is suspended.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    suspended: bool,
    /// The VM's state; absent if it was not requested, `null` if the VM did not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<Option<VmState>>,
}

#[derive(Serialize)]
struct Usage {
    private_bytes: u64,
    shared_bytes: u64,
    swapped_bytes: u64,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let runtime = context.runtime()?;
    let running = runtime.running()?;
    let mut suspended = match runtime.suspended() {
        Ok(vms) => vms.list()?,
        // A user without a home has none.
        Err(_) => Vec::new(),
    };
    // A VM whose suspension was interrupted is paused in its process.
    suspended.retain(|vm| {
        !running
            .iter()
            .any(|it| it.dir.name() == vm.record.config.name)
    });
    suspended.dedup_by(|a, b| a.record.config.name == b.record.config.name);
    if args.quiet && !context.output.is_json() {
        let names = running.iter().map(|vm| vm.dir.name());
        let suspended = suspended.iter().map(|vm| vm.record.config.name.clone());
        let names: Vec<String> = names.chain(suspended).collect();
        context.output.print(&names, |names| names.join("\n"));
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows: Vec<Row> = running.iter().map(row).collect();
    if args.state {
        for (row, state) in rows.iter_mut().zip(states(&running)) {
            row.state = Some(state);
        }
    }
    rows.extend(suspended.iter().map(suspended_row));
    context.output.print(&rows, |rows| text(rows, args.state));
    Ok(ExitCode::SUCCESS)
}

fn row(vm: &RunningVm) -> Row {
    // A VM that ends during the listing is listed without the facts from its description.
    let config: Option<VmConfig> = vm.dir.config().ok();
    Row {
        name: vm.dir.name(),
        pid: Some(vm.process.pid),
        vcpus: config.as_ref().map(|config| config.vcpus),
        memory_bytes: config.as_ref().map(|config| config.memory.0),
        usage: ProcessUsage::of(vm.process.pid).ok().map(|usage| Usage {
            private_bytes: usage.private,
            shared_bytes: usage.shared,
            swapped_bytes: usage.swapped,
        }),
        suspended: false,
        state: None,
    }
}

fn suspended_row(vm: &SuspendedVm) -> Row {
    let config = &vm.record.config;
    Row {
        name: config.name.clone(),
        pid: None,
        vcpus: Some(config.vcpus),
        memory_bytes: Some(config.memory.0),
        usage: None,
        suspended: true,
        state: None,
    }
}

/// Queries the state of all VMs in parallel; `None` for those that do not answer in time.
fn states(vms: &[RunningVm]) -> Vec<Option<VmState>> {
    let next = AtomicUsize::new(0);
    // Each thread holds the lock for one assignment.
    let states = Mutex::new(vec![None; vms.len()]);
    std::thread::scope(|scope| {
        for _ in 0..ASKERS.min(vms.len()) {
            scope.spawn(|| {
                while let Some(vm) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    vms.get(index).map(|vm| (index, vm))
                } {
                    let (index, vm) = vm;
                    let client = Client::new(vm.dir.control_socket()).with_timeout(PATIENCE);
                    let state = client.info().ok().map(|info| info.state);
                    if let Ok(mut states) = states.lock() {
                        states[index] = state;
                    }
                }
            });
        }
    });
    states.into_inner().unwrap_or_default()
}

fn text(rows: &[Row], with_state: bool) -> String {
    let mut head = vec!["NAME", "PID", "CPUS", "MEMORY", "PRIVATE", "SHARED"];
    if with_state {
        head.push("STATE");
    }
    let mut lines = vec![head.into_iter().map(str::to_owned).collect()];
    for row in rows {
        let unknown = || if row.suspended { "-" } else { "?" }.to_owned();
        let mut line = vec![
            row.name.clone(),
            row.pid
                .map_or_else(|| "suspended".to_owned(), |pid| pid.to_string()),
            row.vcpus.map_or_else(unknown, |n| n.to_string()),
            row.memory_bytes.map_or_else(unknown, human_bytes),
        ];
        let usage = row.usage.as_ref();
        // Swapped memory is private as well.
        let private = usage.map(|usage| usage.private_bytes + usage.swapped_bytes);
        line.push(private.map_or_else(unknown, human_bytes));
        line.push(usage.map_or_else(unknown, |usage| human_bytes(usage.shared_bytes)));
        if row.suspended && with_state {
            line.push("suspended".to_owned());
        }
        if let Some(state) = row.state {
            line.push(match state {
                Some(VmState::Running) => "running".into(),
                Some(VmState::Paused) => "paused".into(),
                Some(VmState::Stopping) => "stopping".into(),
                Some(VmState::Standby) => "standby".into(),
                Some(VmState::Incoming) => "incoming".into(),
                Some(VmState::Arrived) => "arrived".into(),
                Some(VmState::Moved) => "moved".into(),
                None => "no answer".into(),
            });
        }
        lines.push(line);
    }
    table(&lines)
}
