//! Opening every host resource of a VM, before its process is jailed. Afterwards it opens no path
//! and makes no socket.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_disk::DiskFiles;
use kvm_ioctls::Kvm;

use super::nets::OpenNet;
use super::start::Start;
use super::{disks, nets};
use crate::error::{Result, failed};
use crate::process::console::ConsoleLog;
use crate::runtime::VmDir;

/// What a VM is made from, open.
pub(super) struct Resources {
    pub(super) kvm: Kvm,
    pub(super) kernel: File,
    pub(super) initrd: Option<File>,
    pub(super) control: UnixListener,
    pub(super) console: UnixListener,
    pub(super) console_log: Option<ConsoleLog>,
    /// `/proc/self/smaps_rollup`, which stays readable in the jail.
    pub(super) memory_map: File,
    pub(super) devices: DeviceResources,
}

/// What its devices are made from, open.
pub(super) struct DeviceResources {
    /// In the order of the description.
    pub(super) disks: Vec<DiskFiles>,
    /// In the order of the description.
    pub(super) nets: Vec<OpenNet>,
    pub(super) vsock: Option<UnixListener>,
}

/// Opens what the description names, takes over what was inherited, and makes the sockets and logs in `dir`.
pub(super) fn open(dir: &VmDir, start: Start) -> Result<(VmConfig, Resources)> {
    let config = start.config;
    let kvm = open_kvm()?;
    let kernel = read_only("open the kernel", &start.boot_kernel)?;
    let initrd = match &config.initrd {
        Some(path) => Some(read_only("open the initrd", path)?),
        None => None,
    };
    let console_log = match config.console.log_limit.0 {
        0 => None,
        limit => Some(ConsoleLog::new(
            log_file(&dir.console_log())?,
            log_file(&dir.old_console_log())?,
            limit,
        )),
    };
    let vsock = match config.vsock.enabled {
        true => Some(listen(&dir.vsock_socket())?),
        false => None,
    };
    let nets = config.net.iter().zip(start.nets);
    let devices = DeviceResources {
        disks: config
            .disks
            .iter()
            .map(disks::open)
            .collect::<Result<_>>()?,
        nets: nets
            .map(|(net, inherited)| nets::open(net, inherited))
            .collect::<Result<_>>()?,
        vsock,
    };
    let resources = Resources {
        kvm,
        kernel,
        initrd,
        control: listen(&dir.control_socket())?,
        console: listen(&dir.console_socket())?,
        console_log,
        memory_map: read_only("open", Path::new("/proc/self/smaps_rollup"))?,
        devices,
    };
    Ok((config, resources))
}

/// Opens `/dev/kvm`, with advice for each way in which that fails.
pub fn open_kvm() -> Result<Kvm> {
    Kvm::new().map_err(|error| {
        let advice = match error.errno() {
            libc::ENOENT => {
                "load the module kvm_intel or kvm_amd; inside a VM, switch on nested virtualization"
            }
            libc::EACCES | libc::EPERM => {
                "join the group that owns /dev/kvm (often `kvm`), or run as root"
            }
            _ => "see the kernel's log (dmesg) for kvm",
        };
        ApiError::new(
            ErrorCode::HostUnsupported,
            format!("cannot open /dev/kvm: {error}"),
        )
        .advise(advice)
    })
}

fn read_only(action: &'static str, path: &Path) -> Result<File> {
    File::open(path).map_err(failed(action, path))
}

fn log_file(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("make the log", path))
}

fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path).map_err(failed("make the socket", path))?;
    listener
        .set_nonblocking(true)
        .map_err(failed("set up the socket", path))?;
    Ok(listener)
}
