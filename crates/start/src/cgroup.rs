//! A cgroup (v2) per VM, with limits of memory and threads: `clone/NAME@HASH` below the root of
//! the hierarchy. The hash is of the runtime directory, as names are unique within one only.
//!
//! This layer is missing where the host has no cgroup v2 with these controllers, or where this
//! process may not change it (because it is not root, or in a container).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clone_api::validate::MAX_SHARES;
use rustix::io::Errno;

/// The limits of a VM's cgroup.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The memory of the VM in bytes: its RAM, and disk layers that are in memory.
    pub guest_memory_bytes: u64,
    /// The number of vCPU threads.
    pub vcpus: u32,
}

/// The parent of the VMs' cgroups.
const PARENT: &str = "/sys/fs/cgroup/clone";
/// Memory beyond that of the VM, in bytes: the process's own memory, the constant part of its page
/// tables, and room for buffers and page cache.
const OVERHEAD_BYTES: u64 = 256 << 20;
/// The most threads besides vCPUs: the event loop, disks' workers, and the kernel's threads for
/// vhost and io_uring.
const OTHER_THREADS: u32 = 256;
/// The memory of a share's server: its tables, and the page cache of directories.
const SHARE_BYTES: u64 = 256 << 20;
/// The time limit for the threads of an ended process to disappear.
const PATIENCE: Duration = Duration::from_secs(2);

/// Moves the calling process into the cgroup of the VM in `runtime_dir`.
///
/// # Errors
/// The reason why this host lacks the layer, as text for the jail's status.
pub fn join(runtime_dir: &Path, limits: Limits) -> Result<(), String> {
    try_join(runtime_dir, limits).map_err(|(action, error)| format!("cannot {action}: {error}"))
}

fn try_join(runtime_dir: &Path, limits: Limits) -> Result<(), (&'static str, io::Error)> {
    delegated(Path::new(PARENT))?;
    let during = |action| move |error| (action, error);
    let leaf = leaf(runtime_dir);
    fs::create_dir(&leaf).map_err(during("make the VM's cgroup"))?;
    // Page tables take one byte for 512: once for the process, and once for KVM.
    let memory = limits.guest_memory_bytes;
    let most = memory + memory / 256 + OVERHEAD_BYTES;
    fs::write(leaf.join("memory.max"), most.to_string()).map_err(during("limit its memory"))?;
    let threads = limits.vcpus + OTHER_THREADS;
    fs::write(leaf.join("pids.max"), threads.to_string()).map_err(during("limit its threads"))?;
    // 0 means the writing process.
    fs::write(leaf.join("cgroup.procs"), "0").map_err(during("join its cgroup"))
}

/// Makes the parent of the VMs' cgroups.
fn delegated(parent: &Path) -> Result<(), (&'static str, io::Error)> {
    let root = parent.parent().unwrap_or(parent);
    let during = |action| move |error| (action, error);
    // Version 1 of the hierarchy has no such file.
    fs::read(root.join("cgroup.controllers")).map_err(during("find cgroup v2"))?;
    let delegate = |dir: &Path| fs::write(dir.join("cgroup.subtree_control"), "+memory +pids");
    delegate(root).map_err(during("use the controllers of memory and pids"))?;
    match fs::create_dir(parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(("make a cgroup", error)),
        _ => delegate(parent).map_err(during("hand controllers to VMs")),
    }
}

/// Raises the memory limit of the VM in `runtime_dir` by `bytes`, or lowers it if that is negative.
/// Only the VM's launcher can do this. Files that the VM writes to a file system in memory (tmpfs)
/// count as its memory as long as they exist.
pub fn grow(runtime_dir: &Path, bytes: i64) -> io::Result<()> {
    let limit = leaf(runtime_dir).join("memory.max");
    let now = match fs::read_to_string(&limit) {
        // The VM has no cgroup, and so no limit.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        now => now?,
    };
    match now.trim().parse::<u64>() {
        Ok(now) => fs::write(&limit, now.saturating_add_signed(bytes).to_string()),
        // The limit is "max": the cgroup has none.
        Err(_) => Ok(()),
    }
}

/// Makes a cgroup for the server of a share of the VM in `runtime_dir`, beside the VM's own.
///
/// # Errors
/// The reason why this host lacks the layer, as text for the jail's status.
pub fn make_for_share(runtime_dir: &Path, index: usize) -> Result<PathBuf, String> {
    let leaf = share_leaf(runtime_dir, index);
    let make = || {
        delegated(Path::new(PARENT))?;
        fs::create_dir(&leaf).map_err(|error| ("make the cgroup of a share", error))?;
        let limit = |file: &str, value: String| fs::write(leaf.join(file), value);
        limit("memory.max", SHARE_BYTES.to_string())
            .map_err(|error| ("limit a share's memory", error))?;
        limit("pids.max", "4".to_owned()).map_err(|error| ("limit a share's threads", error))
    };
    match make() {
        Ok(()) => Ok(leaf),
        Err((action, error)) => Err(format!("cannot {action}: {error}")),
    }
}

fn share_leaf(runtime_dir: &Path, index: usize) -> PathBuf {
    let mut leaf = leaf(runtime_dir).into_os_string();
    leaf.push(format!(".share{index}"));
    leaf.into()
}

/// Removes the cgroups of the VM in `runtime_dir`, whose process has ended, and those of its shares,
/// whose servers end with it.
pub fn remove(runtime_dir: &Path) -> io::Result<()> {
    for index in 0..MAX_SHARES {
        remove_leaf(&share_leaf(runtime_dir, index))?;
    }
    remove_leaf(&leaf(runtime_dir))
}

fn remove_leaf(leaf: &Path) -> io::Result<()> {
    loop {
        // The events file is opened before the attempt, so that no later change is missed.
        let events = File::open(leaf.join("cgroup.events"));
        match fs::remove_dir(leaf) {
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                // The process's last threads are still ending.
                if !changes(&events?)? {
                    return Err(error);
                }
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(()),
        }
    }
}

/// Waits for a change of a `cgroup.events` file; false if there was none in time.
fn changes(events: &File) -> io::Result<bool> {
    clone_base::wait::exceptional(events, Some(PATIENCE))
}

/// The directory of the cgroup of the VM in `runtime_dir`.
pub fn leaf(runtime_dir: &Path) -> PathBuf {
    let bytes = runtime_dir.as_os_str().as_encoded_bytes();
    // FNV-1a gives the same name in every command of every version.
    let hash = bytes.iter().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3)
    });
    let name = runtime_dir.file_name().unwrap_or_default();
    Path::new(PARENT).join(format!("{}@{hash:016x}", name.to_string_lossy()))
}
