//! `clone pause`, `suspend`, `resume`, `stop`, `kill` and `rm`: change the state of VMs.

use std::process::ExitCode;
use std::time::Duration;

use clone_api::control::VmState;
use clone_api::{ApiError, Client, ErrorCode};
use clone_host::launch::resume;
use clone_host::runtime::{RunningVm, Runtime};
use clone_host::suspend;
use clone_start::error::Result;
use clone_start::vm_dir::Status;
use rustix::process::Signal;

use super::output::control_error;
use super::{Context, agent};

/// The time limit for a killed process to disappear; it only has to free memory.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// The time limit for the agent before the power button is used.
const AGENT_LIMIT: Duration = Duration::from_secs(3);

/// Stop a VM's CPUs and devices; it can be resumed.
#[derive(Debug, clap::Args)]
pub(super) struct PauseArgs {
    /// The VMs.
    #[arg(required = true)]
    names: Vec<String>,
}

/// Suspend a VM: keep its state on disk, and end its process.
///
/// A suspended VM uses no memory and survives a reboot of the host. `clone resume` brings back the
/// same VM: its programs go on where they were, with the same identity and, behind NAT, the same
/// address. What is kept of memory and of ephemeral disks is the difference to the VM's template.
/// Network connections to the outside do not survive a long suspension.
#[derive(Debug, clap::Args)]
pub(super) struct SuspendArgs {
    /// The VMs.
    #[arg(required = true)]
    names: Vec<String>,
}

/// Resume a paused or suspended VM.
#[derive(Debug, clap::Args)]
pub(super) struct ResumeArgs {
    /// The VMs.
    #[arg(required = true)]
    names: Vec<String>,
}

/// Ask a VM's guest to shut down, and wait until it has shut down.
#[derive(Debug, clap::Args)]
pub(super) struct StopArgs {
    /// The VMs.
    #[arg(required = true)]
    names: Vec<String>,
    /// Seconds to wait for the guest.
    #[arg(long, short, default_value_t = 30, value_name = "SECONDS")]
    timeout: u64,
    /// Kill a VM whose guest does not shut down in time, or cannot be reached.
    #[arg(long, short)]
    force: bool,
}

/// End a VM at once, without asking its guest.
#[derive(Debug, clap::Args)]
pub(super) struct KillArgs {
    /// The VMs.
    #[arg(required = true)]
    names: Vec<String>,
}

/// Remove the files that a VM left on this host.
///
/// The files of a VM that has ended are removed automatically by the next command. The state of a
/// suspended VM is lost. With --force, a running VM is killed first.
#[derive(Debug, clap::Args)]
pub(super) struct RmArgs {
    /// The VMs.
    #[arg(required = true)]
    names: Vec<String>,
    /// Kill the VM first if it is running.
    #[arg(long, short)]
    force: bool,
}

/// Runs `act` for each VM, also after a failure. All failures but the last are printed immediately;
/// the last is returned.
fn each(
    context: &Context,
    names: &[String],
    act: impl Fn(&Runtime, &str) -> Result<()>,
) -> Result<ExitCode> {
    let runtime = context.runtime()?;
    let mut last = None;
    let mut done = Vec::new();
    for name in names {
        match act(&runtime, name) {
            Ok(()) => done.push(name),
            Err(error) => {
                if let Some(earlier) = last.replace(error) {
                    context.output.error(&earlier);
                }
            }
        }
    }
    context.output.print(&done, |done| {
        let lines: Vec<&str> = done.iter().map(|name| name.as_str()).collect();
        lines.join("\n")
    });
    last.map_or(Ok(ExitCode::SUCCESS), Err)
}

fn client(vm: &RunningVm) -> Client {
    Client::new(vm.dir.control_socket())
}

pub(super) fn pause(context: &Context, args: &PauseArgs) -> Result<ExitCode> {
    each(context, &args.names, |runtime, name| {
        client(&runtime.find(name)?)
            .pause()
            .map_err(control_error(name))
    })
}

pub(super) fn suspend(context: &Context, args: &SuspendArgs) -> Result<ExitCode> {
    each(context, &args.names, |runtime, name| {
        suspend::suspend(runtime, &runtime.find(name)?).map(drop)
    })
}

pub(super) fn resume(context: &Context, args: &ResumeArgs) -> Result<ExitCode> {
    each(context, &args.names, |runtime, name| {
        // A state of a VM whose process exists is that of a suspension that was interrupted: the
        // process keeps the guest paused in it.
        let running = runtime.find(name);
        if running.is_err()
            && let Some(suspended) = runtime.suspended()?.find(name)?
        {
            let resumed = resume::resume(runtime, &suspended, None)?;
            for notice in &resumed.notices {
                context.output.note(&format!("[clone: {name}: {notice}]"));
            }
            return Ok(());
        }
        client(&running?).resume().map_err(control_error(name))
    })
}

pub(super) fn stop(context: &Context, args: &StopArgs) -> Result<ExitCode> {
    let limit = Duration::from_secs(args.timeout);
    each(context, &args.names, |runtime, name| {
        let vm = runtime.find(name)?;
        if let Err(error) = ask_guest(&vm) {
            // With --force, a VM whose process or guest does not answer is killed as well.
            return match args.force {
                true => end(runtime, &vm),
                false => Err(error),
            };
        }
        if vm.process.wait(Some(limit))? {
            return runtime.sweep_one(&vm.dir).map(drop);
        }
        if args.force {
            return end(runtime, &vm);
        }
        Err(ApiError::new(
            ErrorCode::Timeout,
            format!(
                "the guest of `{name}` has not shut down within {} seconds",
                args.timeout
            ),
        )
        .advise(format!(
            "wait longer with --timeout, or end it with: clone kill {name}"
        )))
    })
}

/// Asks the guest to shut down: by its agent if there is one, otherwise by the power button.
fn ask_guest(vm: &RunningVm) -> Result<()> {
    let name = vm.dir.name();
    let client = client(vm);
    let running = client.info().map_err(control_error(&name))?.state == VmState::Running;
    // A paused guest does not answer; the power button reports that at once.
    if running && vm.dir.config()?.vsock.enabled {
        match agent::shut_down_within(vm, AGENT_LIMIT) {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(message = error.message, "no agent to ask"),
        }
    }
    client.power_button().map_err(control_error(&name))
}

pub(super) fn kill(context: &Context, args: &KillArgs) -> Result<ExitCode> {
    each(context, &args.names, |runtime, name| {
        end(runtime, &runtime.find(name)?)
    })
}

pub(super) fn rm(context: &Context, args: &RmArgs) -> Result<ExitCode> {
    each(context, &args.names, |runtime, name| {
        let swept = runtime.sweep()?;
        if swept.iter().any(|gone| gone == name) {
            return Ok(());
        }
        if runtime.dir(name).status()? == Status::Absent
            && runtime.suspended()?.find(name)?.is_some()
        {
            return runtime.suspended()?.remove(name);
        }
        let vm = runtime.find(name)?;
        if !args.force {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("the VM `{name}` runs"),
            )
            .advise(format!(
                "stop it first (clone stop {name}), or kill and remove it: clone rm --force {name}"
            )));
        }
        end(runtime, &vm)
    })
}

/// Kills the VM's process, which also ends one that no longer answers, and removes the VM's
/// resources.
fn end(runtime: &Runtime, vm: &RunningVm) -> Result<()> {
    vm.process.signal(Signal::KILL)?;
    if !vm.process.wait(Some(KILL_LIMIT))? {
        return Err(ApiError::new(
            ErrorCode::Timeout,
            format!(
                "process {} of `{}` was killed and does not end",
                vm.process.pid,
                vm.dir.name()
            ),
        )
        .advise("it may wait for a disk or network that does not answer: see dmesg"));
    }
    runtime.sweep_one(&vm.dir)?;
    // A suspension that was interrupted has left a state of the VM, which is not wanted any more.
    runtime.discard_suspended(&vm.dir.name())
}
