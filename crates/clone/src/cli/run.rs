//! `clone run`: starts a VM.

use std::io::IsTerminal;
use std::process::ExitCode;

use agent_proto::text::printable;
use clone_api::{ApiError, ErrorCode};
use clone_host::launch::{Launched, launch};
use clone_host::runtime::Runtime;
use clone_start::error::Result;
use clone_start::invocation;
use serde::Serialize;

use super::args::{JailArgs, VmArgs};
use super::tty_console::{self, End};
use super::{Context, exit};

/// Start a VM, and stay attached to its console.
///
/// On a terminal, Ctrl-] detaches from the console, and the VM keeps running. Without a terminal,
/// the console's output is printed until the VM ends.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    vm: VmArgs,
    #[command(flatten)]
    jail: JailArgs,
    /// Return as soon as the guest runs, and print the VM's name.
    #[arg(long, short)]
    detach: bool,
}

/// The output of `clone run --json`.
#[derive(Serialize)]
struct Started {
    name: String,
    pid: u32,
    control_socket: String,
    vsock_socket: String,
    console_socket: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notices: Vec<String>,
}

pub(super) fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let config = args.vm.into_config()?;
    let runtime = context.runtime()?.requiring(args.jail.required());
    let launched = launch(&runtime, config)?;
    for notice in &launched.notices {
        context.output.note(&format!("[clone: {notice}]"));
    }
    if args.detach || context.output.is_json() {
        let dir = &launched.dir;
        let started = Started {
            name: dir.name(),
            pid: launched.process.pid,
            control_socket: dir.control_socket().display().to_string(),
            vsock_socket: dir.vsock_socket().display().to_string(),
            console_socket: dir.console_socket().display().to_string(),
            notices: launched.notices,
        };
        context
            .output
            .print(&started, |started| started.name.clone());
        return Ok(ExitCode::SUCCESS);
    }
    stay(context, &runtime, launched)
}

fn stay(context: &Context, runtime: &Runtime, mut launched: Launched) -> Result<ExitCode> {
    let name = launched.dir.name();
    if std::io::stdin().is_terminal() {
        context
            .output
            .note(&format!("[clone: console of {name}; Ctrl-] leaves it]\r"));
    }
    match tty_console::attach(&launched.dir) {
        Ok(End::Left) => {
            context.output.note(&format!(
                "[clone: {name} runs on; come back with: clone attach {name}]"
            ));
            return Ok(ExitCode::SUCCESS);
        }
        Ok(End::Closed) => {}
        // The VM may have ended before its console could be attached.
        Err(_) if !launched.process.is_alive() => {}
        Err(error) => return Err(error),
    }
    let status = launched
        .child
        .wait()
        .map_err(|error| ApiError::internal(&error))?;
    let log = std::fs::read_to_string(launched.dir.vmm_log()).unwrap_or_default();
    runtime.sweep_one(&launched.dir)?;
    report_end(context, &name, status.code(), &log)
}

/// Reports how the VM ended, and returns the exit code.
fn report_end(context: &Context, name: &str, code: Option<i32>, log: &str) -> Result<ExitCode> {
    match code.and_then(|code| u8::try_from(code).ok()) {
        Some(invocation::EXIT_POWER_OFF) => Ok(ExitCode::SUCCESS),
        Some(invocation::EXIT_REBOOT) => {
            context.output.note(&format!(
                "[clone: {name} asked for a reboot, which ends it]"
            ));
            Ok(ExitCode::SUCCESS)
        }
        Some(invocation::EXIT_KILLED) => {
            context.output.note(&format!("[clone: {name} was killed]"));
            Ok(ExitCode::from(exit::FAILURE))
        }
        Some(invocation::EXIT_CRASH) => Err(ended(format!("the guest of `{name}` crashed"), log)),
        Some(_) => Err(ended(format!("the VM `{name}` failed"), log)),
        None => {
            context.output.note(&format!("[clone: {name} was killed]"));
            Ok(ExitCode::from(exit::FAILURE))
        }
    }
}

fn ended(mut message: String, log: &str) -> ApiError {
    if let Some(last) = log.lines().last() {
        message.push_str(": ");
        message.push_str(&printable(last));
    }
    ApiError::new(ErrorCode::Internal, message)
}
