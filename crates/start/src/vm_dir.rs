//! A VM's runtime directory: what its launcher, its process and other commands keep in it.
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
//! Making, finding and removing these directories is left to the launching side.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clone_api::{ApiError, MacAddr, VmConfig};
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::document::{BootSource, ForkDisk};
use crate::error::{Result, failed};
use crate::process::Process;
use crate::shared_file::SharedFile;

/// Holds the path where a standby's directory was made.
const BORN: &str = "born";
/// Holds a [`Parent`].
const PARENT: &str = "parent.json";
/// Holds a list of [`GuestInterface`].
const NETWORK: &str = "network.json";
/// What the VM's owner should know of its start.
const NOTICES: &str = "notices.json";

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

    /// The file of the description.
    pub fn config_file(&self) -> PathBuf {
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

    /// The file that names the process.
    pub fn pid_file(&self) -> PathBuf {
        self.path.join("pid")
    }

    /// The file that a launcher locks while it starts the VM.
    pub fn lock_file(&self) -> PathBuf {
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
    pub fn process(&self) -> Result<Option<Process>> {
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

    /// Keeps the description for other commands.
    pub fn write_config(&self, config: &VmConfig) -> Result<()> {
        write_json(&self.config_file(), config)
    }

    /// Keeps how the guest is to set up its interfaces.
    pub fn write_guest_network(&self, interfaces: &[GuestInterface]) -> Result<()> {
        write_json(&self.path.join(NETWORK), interfaces)
    }

    /// Keeps what the VM's owner should know: of a standby, who that is turns out later.
    pub fn write_notices(&self, notices: &[String]) -> Result<()> {
        match notices {
            [] => Ok(()),
            notices => write_json(&self.path.join(NOTICES), notices),
        }
    }

    /// Tells who the VM is: from here on the directory lives and dies with that process.
    pub fn write_process(&self, process: Process) -> Result<()> {
        process.write(&self.pid_file())
    }

    /// Notes where the directory was made, for one that will be renamed.
    pub fn write_born(&self) -> Result<()> {
        let path = self.path.join(BORN);
        fs::write(&path, self.path.as_os_str().as_bytes()).map_err(failed("write", &path))
    }

    /// Whether the launcher has reported that the VM started: its last word is the [`Parent`].
    pub fn is_reported(&self) -> bool {
        self.path.join(PARENT).exists()
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

/// How a guest is to set up its interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAddress {
    /// Its address.
    pub address: Ipv4Addr,
    /// The network's prefix length in bits.
    pub prefix: u8,
    /// Where it sends what is not on its network.
    pub gateway: Ipv4Addr,
    /// Whom it asks for names.
    pub name_servers: Vec<IpAddr>,
}

impl GuestAddress {
    /// The kernel argument that sets up `device` in a guest whose kernel has `CONFIG_IP_PNP`, or
    /// whose initramfs reads it. Source: the Linux kernel's `nfsroot.rst`.
    pub fn kernel_argument(&self, host_name: &str, device: &str) -> String {
        let netmask = Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(self.prefix.clamp(1, 32))));
        let mut argument = format!(
            "ip={}::{}:{netmask}:{host_name}:{device}:off",
            self.address, self.gateway
        );
        for server in self.name_servers.iter().take(2) {
            argument.push_str(&format!(":{server}"));
        }
        argument
    }
}
