//! A VM's runtime directory, which its launcher, its process and other commands share.
//!
//! `ROOT/vms/NAME/` (mode 0700) holds
//! - `config.json`: the VM's description;
//! - `pid`: the process and its start time ([`Process`]);
//! - `lock`: locked by a launcher while it starts the VM;
//! - `control.sock`, `console.sock`, `vsock.sock`;
//! - `console.log` and `console.log.old`: the console's output;
//! - `vmm.log`: the log of the VM's process;
//! - `parent.json`, `network.json`: [`Parent`], [`GuestInterface`]s;
//! - `notices.json`: notices about the VM's start for its owner, if there are any.
//!
//! The launching side (`clone-host`) makes, finds and removes these directories.

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

use crate::document::Parent;
use crate::error::{Result, failed};
use crate::process::Process;

/// The file with the path at which a standby's directory was made.
const BIRTH_PATH: &str = "born";
/// The file with a [`Parent`].
const PARENT: &str = "parent.json";
/// The file with a list of [`GuestInterface`].
const NETWORK: &str = "network.json";
/// The file with notices about the VM's start for its owner.
const NOTICES: &str = "notices.json";

/// The status of a VM, according to its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// There is no directory.
    Absent,
    /// A launcher is starting the VM.
    Starting,
    /// The VM's process runs.
    Running(Process),
    /// The VM's process has ended, or was never started.
    Stale,
}

/// A VM's directory.
#[derive(Debug, Clone)]
pub struct VmDir {
    path: PathBuf,
}

impl VmDir {
    /// Makes a handle of the directory at `path`, which need not exist.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The VM's name.
    pub fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The path at which the directory was made. Adoption renames a standby's directory, but the
    /// resources that were set up on the host for it keep the first path.
    pub fn birth_path(&self) -> PathBuf {
        match fs::read(self.path.join(BIRTH_PATH)) {
            Ok(path) if !path.is_empty() => PathBuf::from(OsString::from_vec(path)),
            _ => self.path.clone(),
        }
    }

    /// The VM's key in the records of the host's network. It is the whole path, since VMs of
    /// several runtime directories share one network.
    pub fn network_key(&self) -> String {
        self.birth_path().display().to_string()
    }

    /// The control socket, which serves HTTP.
    pub fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// The socket that carries the serial console's bytes.
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

    /// The console's older output.
    pub fn old_console_log(&self) -> PathBuf {
        self.path.join("console.log.old")
    }

    /// The log of the VM's process.
    pub fn vmm_log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    /// The file of the description.
    pub fn config_file(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// Changes the stored description.
    pub fn change_config(&self, change: impl FnOnce(&mut VmConfig)) -> Result<()> {
        let mut config = self.config()?;
        change(&mut config);
        write_json(&self.config_file(), &config)
    }

    /// The files that snapshots and forks of the VM build on.
    pub fn parent(&self) -> Result<Parent> {
        read_json(&self.path.join(PARENT))
    }

    /// Replaces the parent, after a snapshot that is kept.
    pub fn write_parent(&self, parent: &Parent) -> Result<()> {
        write_json(&self.path.join(PARENT), parent)
    }

    /// The network configuration for the guest.
    pub fn guest_network(&self) -> Result<Vec<GuestInterface>> {
        read_json(&self.path.join(NETWORK))
    }

    /// The notices about the VM's start for its owner; empty if none were stored.
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

    /// The VM's description, with the name that the directory has now; an adopted VM was made under
    /// another name.
    pub fn config(&self) -> Result<VmConfig> {
        let config: VmConfig = read_json(&self.config_file())?;
        Ok(VmConfig {
            name: self.name(),
            ..config
        })
    }

    /// The process that the directory names, whether or not it runs.
    pub fn process(&self) -> Result<Option<Process>> {
        Process::read(&self.pid_file())
    }

    /// The VM's present status.
    pub fn status(&self) -> Result<Status> {
        if let Some(process) = self.process()?
            && process.is_alive()
        {
            return Ok(Status::Running(process));
        }
        // There is no process: either a launcher has not started it yet, or it has ended.
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

    /// Stores the description for other commands.
    pub fn write_config(&self, config: &VmConfig) -> Result<()> {
        write_json(&self.config_file(), config)
    }

    /// Stores the network configuration for the guest.
    pub fn write_guest_network(&self, interfaces: &[GuestInterface]) -> Result<()> {
        write_json(&self.path.join(NETWORK), interfaces)
    }

    /// Stores notices for the owner, who is not yet known for a standby.
    pub fn write_notices(&self, notices: &[String]) -> Result<()> {
        match notices {
            [] => Ok(()),
            notices => write_json(&self.path.join(NOTICES), notices),
        }
    }

    /// Records the VM's process. From then on the directory is valid as long as that process runs.
    pub fn write_process(&self, process: Process) -> Result<()> {
        process.write(&self.pid_file())
    }

    /// Records the path at which the directory was made, for one that will be renamed.
    pub fn write_birth_path(&self) -> Result<()> {
        let path = self.path.join(BIRTH_PATH);
        fs::write(&path, self.path.as_os_str().as_bytes()).map_err(failed("write", &path))
    }

    /// Whether the launcher has finished the VM's start: it writes the [`Parent`] last.
    pub fn is_reported(&self) -> bool {
        self.path.join(PARENT).exists()
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(failed("read", path))?;
    serde_json::from_slice(&text).map_err(|error| failed("understand", path)(error.into()))
}

/// Writes the file atomically.
fn write_json<T: Serialize + ?Sized>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| ApiError::internal(&error))?;
    clone_base::file::replace_volatile(path, 0o644, &text).map_err(failed("write", path))
}

/// A network interface as its guest must configure it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// The interface's hardware address.
    pub mac: MacAddr,
    /// The address configuration, if the host assigns it.
    pub address: Option<GuestAddress>,
}

/// The address configuration of a guest's interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAddress {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The network's prefix length in bits.
    pub prefix: u8,
    /// The default gateway.
    pub gateway: Ipv4Addr,
    /// The DNS servers.
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
