//! Starts a VM's process. Everything is checked first, and a start that fails leaves nothing
//! behind.
//!
//! [`launch`] boots a kernel; [`arriving`] waits for a VM that another host sends; [`fork`] makes clones of a template or of a running VM; [`standby`]
//! keeps clones ready in advance.

pub(crate) mod arriving;
pub mod fork;
pub mod identity;
mod network;
pub mod preflight;
mod program;
mod reaper;
pub mod resume;
mod shares;
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
use clone_start::document::{self, BootSource, Origin, Parent, Start};
use clone_start::error::{Result, failed};
use clone_start::vm_dir::GuestInterface;
use clone_start::{Process, VmDir};
use clone_start::{disks, invocation, report};

use crate::runtime::{Runtime, StartingVm};
use crate::scratch;
use network::Attached;

/// The number of lines of an ended process's log that are shown.
const LOG_LINES: usize = 5;

/// A VM that was started and runs.
#[derive(Debug)]
pub struct Launched {
    /// The VM's runtime directory.
    pub dir: VmDir,
    /// The VM's process.
    pub process: Process,
    /// The VM's process as a child of this one.
    pub child: Child,
    /// Notices for the owner.
    pub notices: Vec<String>,
}

/// Starts the VM that `config` describes, and returns when its guest runs.
pub fn launch(runtime: &Runtime, mut config: VmConfig) -> Result<Launched> {
    preflight::check_files(&config)?;
    runtime.check_not_suspended(&config.name)?;
    for disk in &mut config.disks {
        disks::find_formats(disk)?;
        disks::described(disk)?;
    }
    let kernel = preflight::boot_kernel(&config.kernel)?;
    preflight::check_memory(&config, &kernel)?;
    // The VM's process opens KVM again; this check reports a failure early, with advice.
    drop(open_kvm()?);
    runtime.sweep()?;
    // The paths are those that the caller gave, so forks of the VM reboot into the same files.
    let source = BootSource {
        kernel: SharedFile::named(kernel),
        initrd: config.initrd.clone().map(SharedFile::named),
    };
    let parent = Parent {
        disks: config.disks.iter().map(disks::as_base).collect(),
        boot: Some(source.clone()),
        ..Parent::default()
    };
    let plan = Plan::new(config, Origin::Boot(source));
    start_or_abandon(runtime, plan, &parent)
}

/// A VM to start, whose description was checked.
pub(crate) struct Plan {
    pub(crate) config: VmConfig,
    pub(crate) origin: Origin,
    /// The interfaces that the guest has already, which keep their addresses where that is possible.
    former_network: Vec<GuestInterface>,
    /// Whether the VM comes from another host.
    incoming: bool,
}

impl Plan {
    /// A VM whose guest has no addresses yet.
    fn new(config: VmConfig, origin: Origin) -> Self {
        Self {
            config,
            origin,
            former_network: Vec::new(),
            incoming: false,
        }
    }
}

/// Starts a VM. After a failure, everything that was set up is removed.
fn start_or_abandon(runtime: &Runtime, plan: Plan, parent: &Parent) -> Result<Launched> {
    let starting = runtime.create(&plan.config)?;
    match start(runtime, &starting, plan, parent) {
        Ok(launched) => Ok(launched),
        Err(error) => {
            // The next command sweeps the remains. The first error is the one to report.
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
    plan: Plan,
    parent: &Parent,
) -> Result<Launched> {
    let Plan {
        mut config,
        origin,
        former_network,
        incoming,
    } = plan;
    // The description must exist before any host resource is set up, since the sweep after a killed
    // launcher reads it.
    starting.dir.write_config(&config)?;
    if matches!(&origin, Origin::Fork(fork) if fork.standby) {
        starting.dir.write_birth_path()?;
    }
    let Attached {
        taps,
        nets,
        guest,
        mut notices,
    } = network::attach(runtime, &starting.dir, &mut config, &former_network)?;
    let shares = shares::start(&starting.dir, &config)?;
    notices.extend(shares.notices);
    let layers_dir = scratch::dir();
    if matches!(origin, Origin::Boot { .. }) && layers_dir.is_none() {
        notices.extend(layers_in_memory(&config));
    }
    starting.dir.write_config(&config)?;
    starting.dir.write_guest_network(&guest)?;
    starting.dir.write_notices(&notices)?;
    let document = Start {
        config,
        origin,
        nets,
        required_jail: runtime.required_jail().clone(),
        layers_dir,
        incoming,
    };
    let words = invocation::words(starting.dir.path());
    let (mut child, socket) = spawn(&starting.dir, words)?;
    let files = taps.into_iter().chain(shares.sockets).collect();
    let started =
        hand_over(starting, &document, files, &mut child, socket).and_then(|(process, jail)| {
            notices.extend(jail.warnings());
            starting.dir.write_notices(&notices)?;
            // The parent is written last, since it marks a standby as ready.
            starting.dir.write_parent(parent)?;
            Ok(process)
        });
    if started.is_err() {
        // The process may hang or be ending; in both cases nothing of it may remain.
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

/// The notice for the owner if the writes to ephemeral disks are kept in memory.
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

/// The status of the jail that VMs get on this host, from a process that builds one around itself.
pub fn check_jail(runtime: &Runtime) -> Result<JailStatus> {
    let config = VmConfig {
        name: Runtime::standby_name("jail-check")?,
        ..VmConfig::default()
    };
    let starting = runtime.create(&config)?;
    let (mut child, _socket) = spawn(&starting.dir, invocation::check_words(starting.dir.path()))?;
    let reported = read_report(&starting.dir, &mut child);
    // The process ends right after its report.
    let _ = child.wait();
    starting.abandon(runtime)?;
    reported
}

/// Starts the program with these arguments, and returns our end of the socket that is its standard
/// input.
fn spawn(dir: &VmDir, words: [&OsStr; 3]) -> Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| ApiError::internal(&error))?;
    let log = open_log(dir)?;
    let mut command = program::command(words)?;
    let child = command
        .current_dir("/")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(failed("start", Path::new(command.get_program())))?;
    Ok((child, ours))
}

/// Opens the log of a VM's processes, and makes it where there is none.
fn open_log(dir: &VmDir) -> Result<File> {
    let log = dir.vmm_log();
    let opened = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log);
    opened.map_err(failed("make the log", &log))
}

/// Records `child` as the VM's process, sends it its description and the open `files`, and reads its
/// report.
fn hand_over(
    starting: &StartingVm,
    start: &Start,
    files: Vec<OwnedFd>,
    child: &mut Child,
    socket: UnixStream,
) -> Result<(Process, JailStatus)> {
    let died = |child: &mut Child| unexplained_end(&starting.dir, child);
    // The process waits for its description, so it cannot have ended before it is recorded.
    let process = Process::of(child.id()).ok_or_else(|| died(child))?;
    starting.dir.write_process(process)?;
    if document::send(&socket, start, &files).is_err() {
        return Err(died(child));
    }
    // From here on, the taps and the servers of shares exist as long as the VM's process.
    drop((files, socket));
    read_report(&starting.dir, child).map(|jail| (process, jail))
}

/// Reads the report of `child`.
fn read_report(dir: &VmDir, child: &mut Child) -> Result<JailStatus> {
    let report = match child.stdout.take() {
        Some(pipe) => report::read(pipe).map_err(|error| ApiError::internal(&error))?,
        // The standard output was requested as a pipe, so this does not occur.
        None => None,
    };
    report.unwrap_or_else(|| Err(unexplained_end(dir, child)))
}

/// The error for a process that ended without a report: its exit status, and its log's last lines.
fn unexplained_end(dir: &VmDir, child: &mut Child) -> ApiError {
    let exit_status = match child.wait() {
        Ok(status) => match status.signal() {
            Some(signal) => format!("was killed by signal {signal}"),
            None => format!("ended with {status}"),
        },
        Err(error) => format!("cannot be waited for: {error}"),
    };
    let message = format!(
        "the VM's process {exit_status} while it started{}",
        last_words(dir)
    );
    ApiError::new(ErrorCode::Internal, message)
}

/// The last lines of a process's log, each preceded by a line break.
fn last_words(dir: &VmDir) -> String {
    let log = fs::read_to_string(dir.vmm_log()).unwrap_or_default();
    let lines: Vec<&str> = log.lines().rev().take(LOG_LINES).collect();
    lines
        .iter()
        .rev()
        .map(|line| format!("\n  {}", printable(line)))
        .collect()
}
