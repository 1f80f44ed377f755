//! The runtime directory: all that the host keeps of a VM while it runs.
//!
//! `ROOT/vms/NAME/` (mode 0700) holds
//! - `config.json`: the description, filled in;
//! - `pid`: the process and its start time ([`Process`]);
//! - `lock`: locked by a launcher while it starts the VM;
//! - `control.sock`, `console.sock`, `vsock.sock`;
//! - `console.log` and `console.log.old`: the console's output;
//! - `vmm.log`: what the VM's process itself says;
//! - `parent.json`, `network.json`: [`Parent`], [`GuestInterface`]s;
//! - `notices.json`: what the VM's owner should know of its start, where there is anything.
//!
//! Hidden beside them: `.standby-*`, VMs that are ready and wait for their name ([`standby`]), and
//! `.live-*`, what live forks share ([`live`]; on disk where it is too large).
//!
//! A directory is *stale* when nobody starts its VM and its process is gone: the next command
//! sweeps it away ([`Runtime::sweep`]).

mod live;
mod process;
mod standby;
mod sweep;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use clone_api::jail::RequiredJail;
use clone_api::{ApiError, ErrorCode, MacAddr, VmConfig};
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Result, failed};
use crate::host_net::GuestAddress;
use crate::process::start::{BootSource, ForkDisk};
use crate::shared_file::SharedFile;
pub use live::LiveDir;
pub use process::Process;

/// Holds the path where a standby's directory was made.
const BORN: &str = "born";
/// Holds a [`Parent`].
const PARENT: &str = "parent.json";
/// Holds a list of [`GuestInterface`].
const NETWORK: &str = "network.json";
/// What the VM's owner should know of its start.
const NOTICES: &str = "notices.json";
/// The longest path of a Unix socket, without its terminator.
const MAX_SOCKET_PATH: usize = 107;
/// The longest socket name in a VM's directory: `vsock.sock_` and a port.
const MAX_SOCKET_NAME: usize = "/vsock.sock_4294967295".len();

/// Where all runtime directories are, and what holds for every VM that is started in one.
#[derive(Debug, Clone)]
pub struct Runtime {
    vms: PathBuf,
    required_jail: RequiredJail,
    /// Where live forks go that are too large for the runtime directory.
    spill: Option<PathBuf>,
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
            spill: live::default_spill_dir(),
            required_jail: RequiredJail::default(),
        })
    }

    /// The same, where no VM is started or taken from the standbys whose jail lacks one of these
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

    /// The directory that a VM of this name has or would have.
    pub fn dir(&self, name: &str) -> VmDir {
        VmDir {
            path: self.vms.join(name),
        }
    }

    /// Where the directories of VMs are.
    pub fn vms_dir(&self) -> &Path {
        &self.vms
    }

    /// Where it is kept that the template of this id was verified.
    pub fn verified_file(&self, template_id: &str) -> PathBuf {
        self.vms.join(format!(".verified-{template_id}"))
    }

    /// The directory of the VM called `name`; an error where there is none that runs.
    ///
    /// What a dead VM of that name left is swept away.
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
                Err(not_found())
            }
            Status::Absent => Err(not_found()),
        }
    }

    /// All VMs that run, by name. Stale directories are swept away on the way.
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
        running.sort_by(|a, b| a.dir.path.cmp(&b.dir.path));
        Ok(running)
    }

    fn dirs(&self) -> Result<Vec<VmDir>> {
        let list = |error| failed("list", &self.vms)(error);
        let mut dirs = Vec::new();
        for entry in fs::read_dir(&self.vms).map_err(list)? {
            let entry = entry.map_err(list)?;
            // The lock of the root is a file, and hidden.
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !hidden && entry.file_type().map_err(list)?.is_dir() {
                dirs.push(VmDir { path: entry.path() });
            }
        }
        Ok(dirs)
    }

    /// Makes the directory for a new VM, locked for its launcher.
    pub fn create(&self, config: &VmConfig) -> Result<StartingVm> {
        let dir = self.dir(&config.name);
        let length = dir.path.as_os_str().len() + MAX_SOCKET_NAME;
        if length > MAX_SOCKET_PATH {
            return Err(ApiError::new(
                ErrorCode::InvalidConfig,
                format!(
                    "{} is too long: sockets in it could not be reached",
                    dir.path.display()
                ),
            )
            .advise("use a shorter name, or a shorter CLONE_RUNTIME_DIR"));
        }
        if dir.status()? == Status::Stale {
            self.sweep_one(&dir)?;
        }
        // Under the root's lock no sweeper sees the directory before it is locked itself.
        let _root = self.lock()?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir.path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => standby::name_taken(&config.name),
                _ => failed("make", &dir.path)(error),
            })?;
        let lock = File::create(dir.lock_file()).map_err(failed("make", &dir.lock_file()))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| failed("lock", &dir.lock_file())(error.into()))?;
        Ok(StartingVm { dir, _lock: lock })
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
    // In a directory with the sticky bit, others can make files but not exchange ours.
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

/// Takes the lock under which directories in `place` are made and removed.
fn lock_in(place: &Path) -> Result<File> {
    let path = place.join(".lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed("open", &path))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|error| failed("lock", &path)(error.into()))?;
    Ok(file)
}

/// What a directory says about its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// There is none.
    Absent,
    /// A launcher is at work.
    Starting,
    /// Its process lives.
    Running(Process),
    /// Its process is gone, or was never there.
    Stale,
}

/// A VM's directory.
#[derive(Debug, Clone)]
pub struct VmDir {
    path: PathBuf,
}

impl VmDir {
    /// A directory at `path`, whatever it holds.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The VM's name.
    pub fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Where it was made. A standby's directory gets another name when it is adopted; what was set
    /// up on the host for it keeps the first.
    pub fn birth_path(&self) -> PathBuf {
        match fs::read(self.path.join(BORN)) {
            Ok(path) if !path.is_empty() => PathBuf::from(OsString::from_vec(path)),
            _ => self.path.clone(),
        }
    }

    /// What the host's network knows the VM by. The whole path: VMs of several runtime
    /// directories share one network.
    pub fn network_key(&self) -> String {
        self.birth_path().display().to_string()
    }

    /// The socket that takes HTTP.
    pub fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// The socket with the serial console's bytes.
    pub fn console_socket(&self) -> PathBuf {
        self.path.join("console.sock")
    }

    /// The socket that leads to the guest's vsock ports.
    pub fn vsock_socket(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    /// The latest output of the console.
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// The output before that.
    pub fn old_console_log(&self) -> PathBuf {
        self.path.join("console.log.old")
    }

    /// What the VM's process says of itself.
    pub fn vmm_log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    fn config_file(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// Changes the kept description.
    pub fn change_config(&self, change: impl FnOnce(&mut VmConfig)) -> Result<()> {
        let mut config = self.config()?;
        change(&mut config);
        write_json(&self.config_file(), &config)
    }

    /// What snapshots and forks of the VM lie on.
    pub fn parent(&self) -> Result<Parent> {
        read_json(&self.path.join(PARENT))
    }

    /// Changes that, after a snapshot that is kept.
    pub fn write_parent(&self, parent: &Parent) -> Result<()> {
        write_json(&self.path.join(PARENT), parent)
    }

    /// How the guest is to set up its interfaces.
    pub fn guest_network(&self) -> Result<Vec<GuestInterface>> {
        read_json(&self.path.join(NETWORK))
    }

    /// What the VM's owner should know of its start; nothing where nothing was kept.
    pub fn notices(&self) -> Vec<String> {
        read_json(&self.path.join(NOTICES)).unwrap_or_default()
    }

    fn pid_file(&self) -> PathBuf {
        self.path.join("pid")
    }

    fn lock_file(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// The description of the VM, by the name that the directory has now: one that was adopted was
    /// made under another.
    pub fn config(&self) -> Result<VmConfig> {
        let config: VmConfig = read_json(&self.config_file())?;
        Ok(VmConfig {
            name: self.name(),
            ..config
        })
    }

    /// The process that the directory names, whether or not it lives.
    fn process(&self) -> Result<Option<Process>> {
        Process::read(&self.pid_file())
    }

    /// What the directory says about its VM now.
    pub fn status(&self) -> Result<Status> {
        if let Some(process) = self.process()?
            && process.is_alive()
        {
            return Ok(Status::Running(process));
        }
        // No process: either a launcher has not got so far, or all is over.
        let path = self.lock_file();
        let lock = match File::open(&path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let exists = self
                    .path
                    .try_exists()
                    .map_err(failed("look for", &self.path))?;
                return Ok(if exists {
                    Status::Stale
                } else {
                    Status::Absent
                });
            }
            Err(error) => return Err(failed("open", &path)(error)),
        };
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(Status::Stale),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(Status::Starting),
            Err(error) => Err(failed("lock", &path)(error.into())),
        }
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(failed("read", path))?;
    serde_json::from_slice(&text).map_err(|error| failed("understand", path)(error.into()))
}

/// Writes all of it or nothing.
fn write_json<T: Serialize + ?Sized>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| ApiError::internal(&error))?;
    let new = path.with_extension("new");
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, path))
        .map_err(failed("write", path))
}

/// A network interface, as its guest is to set it up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// Its hardware address.
    pub mac: MacAddr,
    /// The rest, where it is ours to give.
    pub address: Option<GuestAddress>,
}

/// What snapshots and forks of a VM lie on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Parent {
    /// The template that it was forked from, or the last kept snapshot of it.
    pub template: Option<PathBuf>,
    /// Memory layers, the base first; none for a VM that was booted.
    pub memory: Vec<SharedFile>,
    /// What each disk has below its own writes.
    pub disks: Vec<ForkDisk>,
    /// What must be locked by those who use them.
    pub locks: Vec<SharedFile>,
    /// What its forks boot when they reboot; absent where a template of an older format has none.
    #[serde(default)]
    pub boot: Option<BootSource>,
}

/// A VM whose process lived when we looked.
#[derive(Debug, Clone)]
pub struct RunningVm {
    /// Its directory.
    pub dir: VmDir,
    /// Its process.
    pub process: Process,
}

/// A VM that this process is starting: nobody sweeps its directory meanwhile.
#[derive(Debug)]
pub struct StartingVm {
    /// Its directory.
    pub dir: VmDir,
    _lock: File,
}

impl StartingVm {
    /// Keeps the description for other commands.
    pub fn write_config(&self, config: &VmConfig) -> Result<()> {
        write_json(&self.dir.config_file(), config)
    }

    /// Keeps how the guest is to set up its interfaces.
    pub fn write_guest_network(&self, interfaces: &[GuestInterface]) -> Result<()> {
        write_json(&self.dir.path.join(NETWORK), interfaces)
    }

    /// Keeps what the VM's owner should know: of a standby, who that is turns out later.
    pub fn write_notices(&self, notices: &[String]) -> Result<()> {
        match notices {
            [] => Ok(()),
            notices => write_json(&self.dir.path.join(NOTICES), notices),
        }
    }

    /// Tells who the VM is: from here on the directory lives and dies with that process.
    pub fn write_process(&self, process: Process) -> Result<()> {
        process.write(&self.dir.pid_file())
    }
}
