//! A cgroup (v2) per VM, with limits of memory and threads: `clone/NAME@HASH` below the root of
//! the hierarchy. The hash is of the runtime directory, as names are unique within one only.
//!
//! Where there is no cgroup v2 with these controllers, or it is not ours to change (not root, or
//! a container), this layer is missing.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// What a VM's cgroup is limited to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The memory that may be the VM's, in bytes: its RAM, and disk layers that are in memory.
    pub guest_memory_bytes: u64,
    /// How many vCPU threads there will be.
    pub vcpus: u32,
}

/// The cgroup that holds those of VMs.
const PARENT: &str = "/sys/fs/cgroup/clone";
/// The process's own memory, its page tables for the guest beside their share, and what buffers
/// and page cache need to flow.
const OVERHEAD_BYTES: u64 = 256 << 20;
/// Threads beside vCPUs: the event loop, disks' workers, the kernel's for vhost and io_uring.
const OTHER_THREADS: u32 = 256;
/// How long the threads of a process that has ended may take to go.
const PATIENCE: Duration = Duration::from_secs(2);

/// Puts the calling process into the cgroup of the VM in `runtime_dir`.
///
/// # Errors
/// Why this host has no such layer, as text for the jail's status.
pub fn join(runtime_dir: &Path, limits: Limits) -> Result<(), String> {
    try_join(runtime_dir, limits).map_err(|(action, error)| format!("cannot {action}: {error}"))
}

fn try_join(runtime_dir: &Path, limits: Limits) -> Result<(), (&'static str, io::Error)> {
    let parent = Path::new(PARENT);
    let root = parent.parent().unwrap_or(parent);
    let during = |action| move |error| (action, error);
    // Version 1 of the hierarchy has no such file.
    fs::read(root.join("cgroup.controllers")).map_err(during("find cgroup v2"))?;
    let delegate = |dir: &Path| fs::write(dir.join("cgroup.subtree_control"), "+memory +pids");
    delegate(root).map_err(during("use the controllers of memory and pids"))?;
    match fs::create_dir(parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(("make a cgroup", error));
        }
        _ => delegate(parent).map_err(during("hand controllers to VMs"))?,
    }
    let leaf = leaf(runtime_dir);
    fs::create_dir(&leaf).map_err(during("make the VM's cgroup"))?;
    // Page tables take a byte in 512: the process's own, and KVM's.
    let memory = limits.guest_memory_bytes;
    let most = memory + memory / 256 + OVERHEAD_BYTES;
    fs::write(leaf.join("memory.max"), most.to_string()).map_err(during("limit its memory"))?;
    let threads = limits.vcpus + OTHER_THREADS;
    fs::write(leaf.join("pids.max"), threads.to_string()).map_err(during("limit its threads"))?;
    // 0 is whoever writes.
    fs::write(leaf.join("cgroup.procs"), "0").map_err(during("join its cgroup"))
}

/// Lets the VM in `runtime_dir` take so many bytes of memory more (or less). Only its launcher can.
/// What it writes into files counts as its
/// memory where the file system keeps them there (tmpfs), for as long as they exist.
pub fn grow(runtime_dir: &Path, bytes: i64) -> io::Result<()> {
    let limit = leaf(runtime_dir).join("memory.max");
    let now = match fs::read_to_string(&limit) {
        // It goes without a limit.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        now => now?,
    };
    match now.trim().parse::<u64>() {
        Ok(now) => fs::write(&limit, now.saturating_add_signed(bytes).to_string()),
        // "max".
        Err(_) => Ok(()),
    }
}

/// Removes the cgroup of the VM in `runtime_dir`, whose process has ended.
pub fn remove(runtime_dir: &Path) -> io::Result<()> {
    let leaf = leaf(runtime_dir);
    loop {
        // Before the attempt, so that no change after it is missed.
        let events = File::open(leaf.join("cgroup.events"));
        match fs::remove_dir(&leaf) {
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                // Its last threads are going.
                if !changes(&events?)? {
                    return Err(error);
                }
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(()),
        }
    }
}

/// Waits for a change of a `cgroup.events`; false where there was none in time.
fn changes(events: &File) -> io::Result<bool> {
    let limit = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
    let mut polled = [PollFd::new(events, PollFlags::PRI)];
    Ok(poll(&mut polled, Some(&limit))? > 0)
}

/// The directory of that cgroup.
pub fn leaf(runtime_dir: &Path) -> PathBuf {
    let bytes = runtime_dir.as_os_str().as_encoded_bytes();
    // FNV-1a: the name must be the same for every command, of every version.
    let hash = bytes.iter().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3)
    });
    let name = runtime_dir.file_name().unwrap_or_default();
    Path::new(PARENT).join(format!("{}@{hash:016x}", name.to_string_lossy()))
}
