//! Opens every host resource of a VM before its process is jailed. The jailed process opens no path
//! and makes no socket.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use clone_api::{ApiError, ErrorCode, Shape, VmConfig};
use clone_disk::DiskFiles;
use clone_memory::{Layer, LayerError, LayerStack, Pagemap};
use clone_start::SharedFile;
use clone_start::VmDir;
use clone_start::document::{BootSource, ForkDisk, ForkSpec, Origin, Start};
use clone_start::error::{Result, failed};
use clone_start::{disks, fits};
use clone_vmm::machine::{Kernel, MachineState};
use clone_vmm::snapshot;
use rustix::fs::FlockOperation;

use super::nets;
use super::nets::OpenNet;
use super::run_once::RunOnce;
use crate::console::ConsoleLog;

/// The reason why a clone of a template in an older format cannot reboot.
const NO_KERNEL: &str =
    "its template has no kernel of its own: `clone template upgrade` makes one that has";

/// The open host resources that a VM is built from.
pub(super) struct Resources {
    pub(super) origin: OpenOrigin,
    /// Whether the guest comes from another host.
    pub(super) incoming: bool,
    pub(super) control: UnixListener,
    pub(super) console: UnixListener,
    pub(super) console_log: Option<ConsoleLog>,
    /// `/proc/self/smaps_rollup`, which stays readable in the jail.
    pub(super) memory_map: File,
    /// `/proc/self/pagemap`, which stays readable in the jail.
    pub(super) pagemap: Pagemap,
    pub(super) devices: DeviceResources,
}

/// The open files that the guest starts from.
pub(super) enum OpenOrigin {
    Boot(BootFiles),
    // Boxed: a state is large.
    Fork(Box<OpenFork>),
}

/// A snapshot, open and checked.
pub(super) struct OpenFork {
    pub(super) memory: LayerStack,
    pub(super) state: MachineState,
    pub(super) prefetch: Option<File>,
    pub(super) observed: bool,
    /// The number of layers that each disk shares with others.
    pub(super) disk_layers: Vec<usize>,
    pub(super) standby: bool,
    /// The kernel that a reboot loads, or the reason why the clone cannot reboot.
    pub(super) boot: std::result::Result<BootFiles, String>,
    /// Lock files, each locked while the VM runs.
    pub(super) locks: Vec<File>,
    /// For a saved VM, which goes on as the same VM: the mark to set before its guest runs.
    pub(super) run_once: Option<RunOnce>,
}

/// A kernel and its initial RAM disk, open.
pub(super) struct BootFiles {
    pub(super) kernel: File,
    pub(super) initrd: Option<File>,
}

impl BootFiles {
    /// Duplicates the descriptors.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let initrd = self.initrd.as_ref().map(File::try_clone);
        Ok(Self {
            kernel: self.kernel.try_clone()?,
            initrd: initrd.transpose()?,
        })
    }

    /// The kernel that `config` boots. `extra_arguments` are the words that its devices need on the
    /// kernel's command line.
    pub(super) fn kernel(self, config: &VmConfig, extra_arguments: &[String]) -> Kernel {
        let mut cmdline = config.kernel_cmdline();
        for argument in extra_arguments {
            cmdline = format!("{cmdline} {argument}");
        }
        Kernel {
            image: self.kernel,
            initrd: self.initrd,
            cmdline,
        }
    }
}

/// The open files that the devices are built from.
pub(super) struct DeviceResources {
    /// The disks' files, in the order of the description.
    pub(super) disks: Vec<DiskFiles>,
    /// The open interfaces, in the order of the description.
    pub(super) nets: Vec<OpenNet>,
    pub(super) vsock: Option<UnixListener>,
    /// The connections to the servers of the shares, in the order of the description.
    pub(super) shares: Vec<OwnedFd>,
}

/// Opens all files that the description names, takes over the queues of taps and the connections to
/// shares that were `received` with it, and makes the sockets and logs in `dir`.
pub(super) fn open(
    dir: &VmDir,
    start: Start,
    received: Vec<OwnedFd>,
) -> Result<(VmConfig, Resources)> {
    start.check()?;
    let config = start.config;
    let shared_disks: Vec<Option<ForkDisk>> = match &start.origin {
        Origin::Boot(_) => config.disks.iter().map(|_| None).collect(),
        Origin::Fork(fork) => fork.parent.disks.iter().cloned().map(Some).collect(),
    };
    let layers_dir = start.layers_dir.as_deref();
    let origin = open_origin(start.origin, &config)?;
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
    let mut received = received.into_iter();
    let devices = DeviceResources {
        disks: config
            .disks
            .iter()
            .zip(&shared_disks)
            .map(|(disk, shared)| disks::open(disk, shared.as_ref(), layers_dir))
            .collect::<Result<_>>()?,
        nets: nets
            .map(|(net, attached)| nets::open(net, attached, &mut received))
            .collect::<Result<_>>()?,
        vsock,
        shares: received.collect(),
    };
    let resources = Resources {
        origin,
        incoming: start.incoming,
        control: listen(&dir.control_socket())?,
        console: listen(&dir.console_socket())?,
        console_log,
        memory_map: read_only("open", Path::new("/proc/self/smaps_rollup"))?,
        pagemap: Pagemap::open().map_err(|error| ApiError::internal(&error))?,
        devices,
    };
    Ok((config, resources))
}

/// Opens every file that `start` names and closes it again. Tests use this to run a start up to the
/// point where KVM is needed, and to see which files a fork touches.
#[doc(hidden)]
pub fn rehearse(dir: &VmDir, start: Start) -> Result<()> {
    open(dir, start, Vec::new()).map(drop)
}

fn open_origin(origin: Origin, config: &VmConfig) -> Result<OpenOrigin> {
    match origin {
        Origin::Boot(source) => open_boot(&source).map(OpenOrigin::Boot),
        Origin::Fork(fork) => open_fork(&fork, config).map(|fork| OpenOrigin::Fork(Box::new(fork))),
    }
}

fn open_boot(source: &BootSource) -> Result<BootFiles> {
    Ok(BootFiles {
        kernel: source.kernel.open()?,
        initrd: source.initrd.as_ref().map(SharedFile::open).transpose()?,
    })
}

fn open_fork(fork: &ForkSpec, config: &VmConfig) -> Result<OpenFork> {
    let locks = fork.parent.locks.iter().map(open_lock);
    let locks = locks.collect::<Result<_>>()?;
    let damaged = |error: LayerError| {
        ApiError::new(ErrorCode::InvalidConfig, error.to_string())
            .advise("`clone template verify` tells all that is wrong")
    };
    let mut layers = Vec::with_capacity(fork.parent.memory.len());
    for shared in &fork.parent.memory {
        let name = shared.path.display().to_string();
        layers.push(Layer::open(shared.open()?, name).map_err(damaged)?);
    }
    let opened = OpenFork {
        memory: LayerStack::new(layers).map_err(damaged)?,
        state: read_state(&fork.state)?,
        prefetch: fork.prefetch.as_ref().map(SharedFile::open).transpose()?,
        observed: fork.observed,
        // A clone needs its kernel only when it reboots.
        boot: match &fork.parent.boot {
            Some(source) => open_boot(source).map_err(|error| error.message),
            None => Err(NO_KERNEL.to_owned()),
        },
        disk_layers: fork
            .parent
            .disks
            .iter()
            .map(|disk| disk.layers.len())
            .collect(),
        standby: fork.standby,
        locks,
        run_once: fork.run_once.as_ref().map(open_mark).transpose()?,
    };
    opened.check_fits(config)?;
    Ok(opened)
}

fn open_lock(shared: &SharedFile) -> Result<File> {
    let file = shared.open()?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)
        .map_err(|error| failed("share the template of", &shared.path)(error.into()))?;
    Ok(file)
}

fn open_mark(shared: &SharedFile) -> Result<RunOnce> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&shared.path)
        .map_err(failed("open", &shared.path))?;
    shared.check(&file)?;
    RunOnce::new(file)
}

fn read_state(shared: &SharedFile) -> Result<MachineState> {
    let mut bytes = Vec::new();
    shared
        .open()?
        .take(snapshot::MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed("read the machine's state", &shared.path))?;
    snapshot::decode(&bytes).map_err(|error| {
        let message = format!("{}: {error}", shared.path.display());
        ApiError::new(ErrorCode::InvalidConfig, message)
    })
}

impl OpenFork {
    /// Refuses a snapshot of a machine other than the one that `config` describes.
    fn check_fits(&self, config: &VmConfig) -> Result<()> {
        let shape = Shape::of(config, &vec![0; config.disks.len()]);
        let (held, described) = (self.memory.layout().size(), shape.memory.0);
        let fits = match held == described {
            true => fits::check_fits(&self.state, &shape),
            false => Err(format!(
                "it has {held} bytes of RAM for a VM of {described}"
            )),
        };
        fits.map_err(|reason| {
            let message = format!("the snapshot is not of the machine described: {reason}");
            ApiError::new(ErrorCode::InvalidConfig, message)
        })
    }
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
