//! Starting a VM's process: everything is checked first, and a start that fails leaves nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clone_api::config::Overlay;
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_image::kernel::KernelCache;

use crate::error::{Result, failed};
use crate::process::open::open_kvm;
use crate::process::report;
use crate::process::start::Start;
use crate::runtime::{Process, Runtime, StartingVm, VmDir};

/// How many lines of a dead process's log are shown.
const LOG_LINES: usize = 5;

/// A VM that runs.
pub(super) struct Launched {
    pub(super) dir: VmDir,
    pub(super) process: Process,
    /// Its process, a child of this one.
    pub(super) child: Child,
}

/// Starts the VM that `config` describes, and returns when its guest runs.
pub(super) fn launch(runtime: &Runtime, config: VmConfig) -> Result<Launched> {
    check_files(&config)?;
    // Opened again by the VM's process; here it only tells early, with advice.
    drop(open_kvm()?);
    runtime.sweep()?;
    let starting = runtime.create(&config)?;
    match start(&starting, config) {
        Ok((process, child)) => Ok(Launched {
            dir: starting.dir.clone(),
            process,
            child,
        }),
        Err(error) => {
            // What is left then is swept by the next command; the first error is the one to tell.
            if let Err(left) = starting.abandon(runtime) {
                tracing::warn!(%left, "a start that failed left something behind");
            }
            Err(error)
        }
    }
}

fn start(starting: &StartingVm, config: VmConfig) -> Result<(Process, Child)> {
    starting.write_config(&config)?;
    let document = Start {
        boot_kernel: boot_kernel(&config.kernel)?,
        config,
    };
    let mut child = spawn(&starting.dir)?;
    let started = hand_over(starting, &document, &mut child);
    if started.is_err() {
        // It may hang or be ending; either way nothing of it may stay.
        let _ = child.kill();
        let _ = child.wait();
    }
    started.map(|process| (process, child))
}

fn spawn(dir: &VmDir) -> Result<Child> {
    let log = dir.vmm_log();
    let log_file = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log)
        .map_err(failed("make the log", &log))?;
    let program = Path::new("/proc/self/exe");
    Command::new(program)
        .arg("vm-process")
        .arg(dir.path())
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log_file)
        .spawn()
        .map_err(failed("start", program))
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
    let log = fs::read_to_string(dir.vmm_log()).unwrap_or_default();
    let lines: Vec<&str> = log.lines().rev().take(LOG_LINES).collect();
    let mut message = format!("the VM's process {how} while it started");
    for line in lines.iter().rev() {
        message.push_str("\n  ");
        message.push_str(line);
    }
    ApiError::new(ErrorCode::Internal, message)
}

/// Finds everything that is wrong with the files that `config` names.
fn check_files(config: &VmConfig) -> Result<()> {
    let mut problems = Vec::new();
    let mut check = |field: String, path: &Path, write: bool| {
        let opened = File::options().read(true).write(write).open(path);
        let problem = match opened.and_then(|file| file.metadata()) {
            Ok(metadata) if metadata.is_dir() => "is a directory".to_owned(),
            Ok(_) => return,
            Err(error) => error.to_string(),
        };
        problems.push(format!("  {field}: {}: {problem}", path.display()));
    };
    check("kernel".into(), &config.kernel, false);
    if let Some(initrd) = &config.initrd {
        check("initrd".into(), initrd, false);
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let write = !disk.read_only && disk.overlay == Overlay::None;
        check(format!("disks[{index}]"), &disk.path, write);
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::InvalidConfig,
        format!("the VM's files cannot be opened:\n{}", problems.join("\n")),
    )
    .advise("check the paths and their permissions; disks are opened for writing unless they are `ro` or have an overlay"))
}

/// The kernel to boot: a `vmlinux` from the cache where it can be entered directly, since a guest
/// unpacks itself slowly; otherwise the file as it is.
fn boot_kernel(kernel: &Path) -> Result<PathBuf> {
    // Whether it is a kernel at all is told in any case.
    clone_image::kernel::inspect(kernel).map_err(|error| {
        ApiError {
            code: ErrorCode::InvalidConfig,
            ..ApiError::internal(&error)
        }
        .advise("use a bzImage (as in /boot/vmlinuz-…) or an ELF vmlinux for x86-64")
    })?;
    let cached = cache_dir()
        .ok_or_else(|| io::Error::other("no home directory").into())
        .and_then(
            |dir| -> std::result::Result<_, Box<dyn std::error::Error>> {
                Ok(KernelCache::open(dir)?.vmlinux(kernel)?)
            },
        );
    match cached {
        Ok(cached) if cached.pvh => Ok(cached.vmlinux),
        Ok(_) => Ok(kernel.to_owned()),
        Err(error) => {
            tracing::debug!(%error, "the kernel is booted as it is");
            Ok(kernel.to_owned())
        }
    }
}

/// Where extracted kernels are kept.
fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = set("CLONE_CACHE_DIR") {
        return Some(PathBuf::from(dir).join("kernels"));
    }
    if rustix::process::geteuid().is_root() {
        return Some("/var/cache/clone/kernels".into());
    }
    let base = match set("XDG_CACHE_HOME") {
        Some(base) => PathBuf::from(base),
        None => PathBuf::from(set("HOME")?).join(".cache"),
    };
    Some(base.join("clone/kernels"))
}
