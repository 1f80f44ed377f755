//! The runtime directories of all VMs of a host: makes, finds and removes them.
//!
//! `ROOT/vms/NAME/` is a [`VmDir`]. Beside those are hidden directories: `.standby-*` for standbys
//! ([`standby`]), and `.live-*` for the layers that live forks share ([`live`]; these are on disk
//! if they are too large).
//!
//! A directory is *stale* when no launcher is starting its VM and its process has ended. The next
//! command removes it ([`Runtime::sweep`]).

mod live;
mod standby;
mod sweep;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use clone_api::control::{Custody, MigrationStatus};
use clone_api::jail::RequiredJail;
use clone_api::{ApiError, Client, ErrorCode, VmConfig};
use clone_start::Process;
use clone_start::error::{Result, failed};
use clone_start::vm_dir::{Status, VmDir};
use clone_template::Verified;

use crate::locked_dir::lock_in;
use crate::suspended::SuspendedVms;
use rustix::fs::FlockOperation;

pub use live::LiveDir;

/// The longest path of a Unix socket, without its terminator.
const MAX_SOCKET_PATH: usize = 107;
/// The longest socket name in a VM's directory: `vsock.sock_` and a port.
const MAX_SOCKET_NAME: usize = "/vsock.sock_4294967295".len();

/// The root of all runtime directories, and the requirements for every VM that is started in it.
#[derive(Debug, Clone)]
pub struct Runtime {
    vms: PathBuf,
    required_jail: RequiredJail,
    /// The directory for live forks; `None` where there is only the runtime directory.
    live: Option<PathBuf>,
    /// The directory for suspended VMs; `None` for a user without a home.
    suspended: Option<PathBuf>,
}

impl Runtime {
    /// The root that the environment names: `$CLONE_RUNTIME_DIR`, else `/run/clone` for root and
    /// `$XDG_RUNTIME_DIR/clone` for others. It is made where it does not exist.
    pub fn from_env() -> Result<Self> {
        let root = match std::env::var_os("CLONE_RUNTIME_DIR") {
            Some(root) if !root.is_empty() => PathBuf::from(root),
            _ if rustix::process::geteuid().is_root() => PathBuf::from("/run/clone"),
            _ => match std::env::var_os("XDG_RUNTIME_DIR") {
                Some(base) if !base.is_empty() => Path::new(&base).join("clone"),
                _ => {
                    return Err(ApiError::new(
                        ErrorCode::HostUnsupported,
                        "there is no place for the sockets of VMs: XDG_RUNTIME_DIR is not set",
                    )
                    .advise("set CLONE_RUNTIME_DIR to a directory of yours, or run as root"));
                }
            },
        };
        Self::at(&root)
    }

    /// A root at `root`, made where it does not exist.
    pub fn at(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).map_err(failed("find", root))?;
        let vms = root.join("vms");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&vms)
            .map_err(failed("make the runtime directory", &vms))?;
        check_owner(&root)?;
        check_owner(&vms)?;
        Ok(Self {
            vms,
            live: data_dir("live"),
            suspended: suspended_dir(),
            required_jail: RequiredJail::default(),
        })
    }

    /// Returns a runtime that starts no VM, and adopts no standby, whose jail lacks one of these
    /// layers.
    #[must_use]
    pub fn requiring(self, required_jail: RequiredJail) -> Self {
        Self {
            required_jail,
            ..self
        }
    }

    /// The layers that the jail of every VM must have.
    pub fn required_jail(&self) -> &RequiredJail {
        &self.required_jail
    }

    /// The directory of the VM `name`, whether or not it exists.
    pub fn dir(&self, name: &str) -> VmDir {
        VmDir::at(self.vms.join(name))
    }

    /// The parent of the VMs' directories.
    pub fn vms_dir(&self) -> &Path {
        &self.vms
    }

    /// Which templates were verified on this host.
    pub fn verified(&self) -> Verified {
        Verified::in_dir(self.vms.clone())
    }

    /// Finds the running VM `name`; returns an error if there is none.
    ///
    /// If the VM's process has ended, its resources are removed.
    pub fn find(&self, name: &str) -> Result<RunningVm> {
        let not_found = || {
            ApiError::new(ErrorCode::NotFound, format!("there is no VM `{name}`"))
                .advise("`clone ls` lists those that run")
        };
        if !clone_api::validate::is_valid_name(name) {
            return Err(not_found());
        }
        let dir = self.dir(name);
        match dir.status()? {
            Status::Running(process) => Ok(RunningVm { dir, process }),
            Status::Starting => Err(ApiError::new(
                ErrorCode::Conflict,
                format!("the VM `{name}` is still starting"),
            )
            .advise("try again in a moment")),
            Status::Stale => {
                self.sweep_one(&dir)?;
                self.check_not_suspended(name)?;
                Err(not_found())
            }
            Status::Absent => {
                self.check_not_suspended(name)?;
                Err(not_found())
            }
        }
    }

    /// All running VMs, ordered by name. Stale directories are removed.
    pub fn running(&self) -> Result<Vec<RunningVm>> {
        let mut running = Vec::new();
        for dir in self.dirs()? {
            match dir.status()? {
                Status::Running(process) => running.push(RunningVm { dir, process }),
                Status::Stale => {
                    self.sweep_one(&dir)?;
                }
                Status::Starting | Status::Absent => {}
            }
        }
        running.sort_by(|a, b| a.dir.path().cmp(b.dir.path()));
        Ok(running)
    }

    fn dirs(&self) -> Result<Vec<VmDir>> {
        let list = |error| failed("list", &self.vms)(error);
        let mut dirs = Vec::new();
        for entry in fs::read_dir(&self.vms).map_err(list)? {
            let entry = entry.map_err(list)?;
            // The root's lock file is hidden too.
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !hidden && entry.file_type().map_err(list)?.is_dir() {
                dirs.push(VmDir::at(entry.path()));
            }
        }
        Ok(dirs)
    }

    /// Makes the directory for a new VM, and locks it for its launcher.
    pub fn create(&self, config: &VmConfig) -> Result<StartingVm> {
        let dir = self.dir(&config.name);
        let length = dir.path().as_os_str().len() + MAX_SOCKET_NAME;
        if length > MAX_SOCKET_PATH {
            return Err(ApiError::new(
                ErrorCode::InvalidConfig,
                format!(
                    "{} is too long: sockets in it could not be reached",
                    dir.path().display()
                ),
            )
            .advise("use a shorter name, or a shorter CLONE_RUNTIME_DIR"));
        }
        if dir.status()? == Status::Stale {
            self.sweep_one(&dir)?;
        }
        // The root's lock keeps sweepers from seeing the directory before it is locked.
        let _root = self.lock()?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(dir.path())
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => standby::name_taken(&config.name),
                _ => failed("make", dir.path())(error),
            })?;
        let lock = File::create(dir.lock_file()).map_err(failed("make", &dir.lock_file()))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| failed("lock", &dir.lock_file())(error.into()))?;
        Ok(StartingVm { dir, _lock: lock })
    }

    /// Sets the directory for suspended VMs.
    #[must_use]
    pub fn with_suspended_dir(self, suspended: PathBuf) -> Self {
        Self {
            suspended: Some(suspended),
            ..self
        }
    }

    /// The suspended VMs of this user.
    ///
    /// # Errors
    /// [`ErrorCode::HostUnsupported`] for a user without a home.
    pub fn suspended(&self) -> Result<SuspendedVms> {
        let dir = self.suspended.clone().ok_or_else(|| {
            let message = "there is no place for suspended VMs: HOME is not set";
            ApiError::new(ErrorCode::HostUnsupported, message)
        })?;
        Ok(SuspendedVms::at(dir))
    }

    /// Removes the states of a VM that is not wanted any more, if there are any.
    ///
    /// # Errors
    /// A state cannot be removed.
    pub fn discard_suspended(&self, name: &str) -> Result<()> {
        match &self.suspended {
            Some(dir) => match SuspendedVms::at(dir.clone()).remove(name) {
                Err(error) if error.code == ErrorCode::NotFound => Ok(()),
                removed => removed,
            },
            None => Ok(()),
        }
    }

    /// Refuses the name of a suspended VM.
    pub(crate) fn check_not_suspended(&self, name: &str) -> Result<()> {
        match &self.suspended {
            Some(dir) => SuspendedVms::at(dir.clone()).check_free(name),
            None => Ok(()),
        }
    }

    /// Refuses to write `bytes` to a directory on whose file system there is no room for them.
    pub(crate) fn check_room(&self, dir: &Path, bytes: u64) -> Result<()> {
        live::check_room(dir, bytes).map(drop)
    }

    /// Takes the lock under which directories are made and removed.
    fn lock(&self) -> Result<File> {
        lock_in(&self.vms)
    }
}

/// Refuses a directory that another user could put sockets into, or exchange.
fn check_owner(dir: &Path) -> Result<()> {
    let found = fs::metadata(dir).map_err(failed("look at", dir))?;
    let (owner, user) = (found.uid(), rustix::process::geteuid().as_raw());
    // In a directory with the sticky bit, other users can make files but not replace ours.
    let others_may_write = found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0;
    if (owner == user || owner == 0) && !others_may_write {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::HostUnsupported,
        format!("other users could exchange what is in {}", dir.display()),
    )
    .advise("name a directory of yours in CLONE_RUNTIME_DIR that only you can write"))
}

/// The directory for suspended VMs: the one that `CLONE_SUSPENDED_DIR` names, or that of this
/// program's data.
fn suspended_dir() -> Option<PathBuf> {
    let named = std::env::var_os("CLONE_SUSPENDED_DIR").filter(|named| !named.is_empty());
    let named = named.and_then(|named| std::path::absolute(named).ok());
    named.or_else(|| data_dir("suspended"))
}

/// The directory `name` of this program's data: below `/var/lib/clone` for root, and below
/// `$XDG_DATA_HOME/clone` (or `~/.local/share/clone`) for others; `None` without a home.
fn data_dir(name: &str) -> Option<PathBuf> {
    let set = |name: &str| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty());
        value.map(PathBuf::from)
    };
    let data = match rustix::process::geteuid().is_root() {
        true => Some(PathBuf::from("/var/lib")),
        false => set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share"))),
    };
    data.map(|data| data.join("clone").join(name))
}

/// A VM whose process was running when it was looked up.
#[derive(Debug, Clone)]
pub struct RunningVm {
    /// The VM's runtime directory.
    pub dir: VmDir,
    /// The VM's process.
    pub process: Process,
}

impl RunningVm {
    /// Refuses a VM that may run on another host.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`].
    pub(crate) fn check_here(&self) -> Result<MigrationStatus> {
        let status = Client::new(self.dir.control_socket()).migration();
        let status = status.map_err(|error| ApiError::internal(&error))?;
        match status.custody {
            Custody::Here => Ok(status),
            _ => {
                let message = "the VM is in a migration whose end is not known";
                Err(ApiError::new(ErrorCode::Conflict, message)
                    .advise("end that first: clone migrate --confirm or --cancel"))
            }
        }
    }
}

/// A VM that this process is starting; its directory is locked, so it is not swept.
#[derive(Debug)]
pub struct StartingVm {
    /// The VM's runtime directory.
    pub dir: VmDir,
    _lock: File,
}
