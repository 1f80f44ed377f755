//! Starting a VM's process: everything is checked first, and a start that fails leaves nothing.
//!
//! [`launch`] boots a kernel; [`fork`] makes clones of a template or of a running VM; [`standby`]
//! keeps clones ready for those who cannot wait.

pub mod fork;
pub mod identity;
mod network;
mod preflight;
pub mod program;
pub mod standby;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};

use clone_api::{ApiError, ErrorCode, VmConfig};

use crate::error::{Result, failed};
use crate::process::open::open_kvm;
use crate::process::start::{Origin, Start};
use crate::process::{disks, report};
use crate::runtime::{Parent, Process, Runtime, StartingVm, VmDir};
use network::Attached;

/// How many lines of a dead process's log are shown.
const LOG_LINES: usize = 5;

/// A VM that runs.
#[derive(Debug)]
pub struct Launched {
    /// Its directory.
    pub dir: VmDir,
    /// Its process.
    pub process: Process,
    /// Its process, a child of this one.
    pub child: Child,
    /// What its owner should know.
    pub notices: Vec<String>,
}

/// Starts the VM that `config` describes, and returns when its guest runs.
pub fn launch(runtime: &Runtime, mut config: VmConfig) -> Result<Launched> {
    preflight::check_files(&config)?;
    for disk in &mut config.disks {
        disks::find_formats(disk)?;
        disks::described(disk)?;
    }
    let kernel = preflight::boot_kernel(&config.kernel)?;
    preflight::check_memory(&config, &kernel)?;
    // Opened again by the VM's process; here it only tells early, with advice.
    drop(open_kvm()?);
    runtime.sweep()?;
    let parent = Parent {
        disks: config.disks.iter().map(disks::as_base).collect(),
        ..Parent::default()
    };
    start_or_abandon(runtime, config, &Origin::Boot { kernel }, &parent)
}

/// Starts a VM of which everything is checked; what is set up before a failure is removed.
fn start_or_abandon(
    runtime: &Runtime,
    config: VmConfig,
    origin: &Origin,
    parent: &Parent,
) -> Result<Launched> {
    let starting = runtime.create(&config)?;
    match start(&starting, config, origin, parent) {
        Ok(launched) => Ok(launched),
        Err(error) => {
            // What is left then is swept by the next command; the first error is the one to tell.
            if let Err(left) = starting.abandon(runtime) {
                tracing::warn!(%left, "a start that failed left something behind");
            }
            Err(error)
        }
    }
}

fn start(
    starting: &StartingVm,
    mut config: VmConfig,
    origin: &Origin,
    parent: &Parent,
) -> Result<Launched> {
    // Before anything is set up that the sweep of a killed launcher must know of.
    starting.write_config(&config)?;
    if matches!(origin, Origin::Fork(fork) if fork.standby) {
        starting.write_born()?;
    }
    let Attached {
        taps,
        nets,
        guest,
        notices,
    } = network::attach(&starting.dir, &mut config)?;
    starting.write_config(&config)?;
    starting.write_guest_network(&guest)?;
    starting.write_notices(&notices)?;
    let document = Start {
        config,
        origin: origin.clone(),
        nets,
    };
    let mut child = spawn(&starting.dir)?;
    // From here the taps live and die with the VM's process.
    drop(taps);
    let started = hand_over(starting, &document, &mut child)
        // Last: a standby with it is one that is ready.
        .and_then(|process| starting.dir.write_parent(parent).map(|()| process));
    if started.is_err() {
        // It may hang or be ending; either way nothing of it may stay.
        let _ = child.kill();
        let _ = child.wait();
    }
    started.map(|process| Launched {
        dir: starting.dir.clone(),
        process,
        child,
        notices,
    })
}

fn spawn(dir: &VmDir) -> Result<Child> {
    let log = dir.vmm_log();
    let log_file = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log)
        .map_err(failed("make the log", &log))?;
    let mut command = program::command(dir.path());
    command
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log_file)
        .spawn()
        .map_err(failed("start", Path::new(command.get_program())))
}

/// Makes `child` the VM's process, tells it what to run, and hears how that went.
fn hand_over(starting: &StartingVm, document: &Start, child: &mut Child) -> Result<Process> {
    let died = |child: &mut Child| unexplained_end(&starting.dir, child);
    // The process waits for its document, so it cannot be gone before it is known by name.
    let process = Process::of(child.id()).ok_or_else(|| died(child))?;
    starting.write_process(process)?;
    let text = serde_json::to_vec(document).map_err(|error| ApiError::internal(&error))?;
    let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        // Both were asked for as pipes.
        return Err(died(child));
    };
    if stdin.write_all(&text).is_err() {
        return Err(died(child));
    }
    drop(stdin);
    match report::read(stdout).map_err(|error| ApiError::internal(&error))? {
        Some(Ok(())) => Ok(process),
        Some(Err(error)) => Err(error),
        None => Err(died(child)),
    }
}

/// The error for a process that ended without a word: how it ended, and its log's last lines.
fn unexplained_end(dir: &VmDir, child: &mut Child) -> ApiError {
    let how = match child.wait() {
        Ok(status) => match status.signal() {
            Some(signal) => format!("was killed by signal {signal}"),
            None => format!("ended with {status}"),
        },
        Err(error) => format!("cannot be waited for: {error}"),
    };
    let message = format!("the VM's process {how} while it started{}", last_words(dir));
    ApiError::new(ErrorCode::Internal, message)
}

/// The last lines of a process's log, each on a line of its own.
fn last_words(dir: &VmDir) -> String {
    let log = fs::read_to_string(dir.vmm_log()).unwrap_or_default();
    let lines: Vec<&str> = log.lines().rev().take(LOG_LINES).collect();
    lines
        .iter()
        .rev()
        .map(|line| format!("\n  {line}"))
        .collect()
}
