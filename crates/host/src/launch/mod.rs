//! Starting a VM's process: everything is checked first, and a start that fails leaves nothing.
//!
//! [`launch`] boots a kernel; [`fork`] makes clones of a template or of a running VM; [`standby`]
//! keeps clones ready for those who cannot wait.

pub mod fork;
pub mod identity;
mod network;
pub mod preflight;
mod program;
mod reaper;
pub mod standby;
#[cfg(test)]
mod testing;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};

use agent_proto::text::printable;
use clone_api::config::{DiskConfig, Overlay};
use clone_api::jail::JailStatus;
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_start::SharedFile;
use clone_start::cpu::open_kvm;
use clone_start::document::{self, BootSource, Origin, Start};
use clone_start::error::{Result, failed};
use clone_start::vm_dir::Parent;
use clone_start::{Process, VmDir};
use clone_start::{disks, invocation, report};

use crate::runtime::{Runtime, StartingVm};
use crate::scratch;
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
    // By the caller's word: forks of the VM reboot into the same.
    let source = BootSource {
        kernel: SharedFile::named(kernel),
        initrd: config.initrd.clone().map(SharedFile::named),
    };
    let parent = Parent {
        disks: config.disks.iter().map(disks::as_base).collect(),
        boot: Some(source.clone()),
        ..Parent::default()
    };
    start_or_abandon(runtime, config, &Origin::Boot(source), &parent)
}

/// Starts a VM of which everything is checked; what is set up before a failure is removed.
fn start_or_abandon(
    runtime: &Runtime,
    config: VmConfig,
    origin: &Origin,
    parent: &Parent,
) -> Result<Launched> {
    let starting = runtime.create(&config)?;
    match start(runtime, &starting, config, origin, parent) {
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
    runtime: &Runtime,
    starting: &StartingVm,
    mut config: VmConfig,
    origin: &Origin,
    parent: &Parent,
) -> Result<Launched> {
    // Before anything is set up that the sweep of a killed launcher must know of.
    starting.dir.write_config(&config)?;
    if matches!(origin, Origin::Fork(fork) if fork.standby) {
        starting.dir.write_born()?;
    }
    let Attached {
        taps,
        nets,
        guest,
        mut notices,
    } = network::attach(&starting.dir, &mut config)?;
    let layers_dir = scratch::dir();
    if matches!(origin, Origin::Boot { .. }) && layers_dir.is_none() {
        notices.extend(layers_in_memory(&config));
    }
    starting.dir.write_config(&config)?;
    starting.dir.write_guest_network(&guest)?;
    starting.dir.write_notices(&notices)?;
    let document = Start {
        config,
        origin: origin.clone(),
        nets,
        required_jail: runtime.required_jail().clone(),
        layers_dir,
    };
    let words = invocation::words(starting.dir.path());
    let (mut child, socket) = spawn(&starting.dir, words)?;
    let started =
        hand_over(starting, &document, taps, &mut child, socket).and_then(|(process, jail)| {
            notices.extend(jail.warnings());
            starting.dir.write_notices(&notices)?;
            // Last: a standby with it is one that is ready.
            starting.dir.write_parent(parent)?;
            Ok(process)
        });
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

/// What the VM's owner must know where writes to ephemeral disks have nowhere to go but memory.
fn layers_in_memory(config: &VmConfig) -> Option<String> {
    let ends_with_vm = |disk: &DiskConfig| !disk.read_only && disk.overlay == Overlay::Ephemeral;
    if !config.disks.iter().any(ends_with_vm) {
        return None;
    }
    Some(format!(
        "writes to ephemeral disks are kept in memory, and end at {} MiB of each disk: \
         this host has no directory on a disk for them (name one with {})",
        clone_disk::MEMORY_ROOM >> 20,
        scratch::VARIABLE
    ))
}

/// How complete the jail is that VMs get on this host: a process builds one around itself.
pub fn check_jail(runtime: &Runtime) -> Result<JailStatus> {
    let config = VmConfig {
        name: Runtime::standby_name("jail-check")?,
        ..VmConfig::default()
    };
    let starting = runtime.create(&config)?;
    let (mut child, _socket) = spawn(&starting.dir, invocation::check_words(starting.dir.path()))?;
    let reported = hear(&starting.dir, &mut child);
    // After its report it has nothing to do but to end.
    let _ = child.wait();
    starting.abandon(runtime)?;
    reported
}

/// Starts the program with these words, and gives our end of the socket that it has as its
/// standard input.
fn spawn(dir: &VmDir, words: [&OsStr; 3]) -> Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| ApiError::internal(&error))?;
    let log = dir.vmm_log();
    let log_file = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log)
        .map_err(failed("make the log", &log))?;
    let mut command = program::command(words)?;
    let child = command
        .current_dir("/")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::piped())
        .stderr(log_file)
        .spawn()
        .map_err(failed("start", Path::new(command.get_program())))?;
    Ok((child, ours))
}

/// Makes `child` the VM's process, sends it what to run with the `taps`, and hears how that went.
fn hand_over(
    starting: &StartingVm,
    start: &Start,
    taps: Vec<OwnedFd>,
    child: &mut Child,
    socket: UnixStream,
) -> Result<(Process, JailStatus)> {
    let died = |child: &mut Child| unexplained_end(&starting.dir, child);
    // The process waits for its document, so it cannot be gone before it is known by name.
    let process = Process::of(child.id()).ok_or_else(|| died(child))?;
    starting.dir.write_process(process)?;
    if document::send(&socket, start, &taps).is_err() {
        return Err(died(child));
    }
    // From here the taps live and die with the VM's process.
    drop((taps, socket));
    hear(&starting.dir, child).map(|jail| (process, jail))
}

/// Hears the report of `child`.
fn hear(dir: &VmDir, child: &mut Child) -> Result<JailStatus> {
    let report = match child.stdout.take() {
        Some(pipe) => report::read(pipe).map_err(|error| ApiError::internal(&error))?,
        // It was asked for as a pipe.
        None => None,
    };
    report.unwrap_or_else(|| Err(unexplained_end(dir, child)))
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
        .map(|line| format!("\n  {}", printable(line)))
        .collect()
}
