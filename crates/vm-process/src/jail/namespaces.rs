//! Moves the process out of the host's file systems, networks, IPC and host names.
//!
//! The new root is an empty, read-only tmpfs: sockets and files are open already, and can be
//! reached only by their descriptors. The process stays in its launcher's PID namespace, since only
//! a newly forked process enters another one. It cannot use the ids of other processes: it has no
//! `/proc`, its user id is its own, and its filters allow no system call that takes such an id.

use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Gid, Uid};
use rustix::thread::UnshareFlags;

use super::{JailError, Layer, failed};

/// Moves the process into new, empty namespaces. `spot` is any directory on which to mount the new
/// root; the mount is not visible outside of the process.
///
/// A process that is not root needs a user namespace. Where the host forbids those, this layer is
/// missing.
pub(super) fn leave_the_host(spot: &Path) -> Result<Layer, JailError> {
    match isolate(spot) {
        Ok(()) => Ok(Ok(())),
        Err(error) if !rustix::process::geteuid().is_root() => Ok(Err(format!(
            "cannot {}: {}; start it as root, or allow user namespaces \
             (kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns, \
             user.max_user_namespaces)",
            error.action, error.source
        ))),
        Err(error) => Err(error),
    }
}

fn isolate(spot: &Path) -> Result<(), JailError> {
    let mut flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWCGROUP;
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if !uid.is_root() {
        flags |= UnshareFlags::NEWUSER;
    }
    // SAFETY: no flag here splits the table of descriptors, which is what can break I/O safety.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(failed("make namespaces"))?;
    if !uid.is_root() {
        map_only_ourselves(uid, gid).map_err(failed("map the user into its namespace"))?;
    }
    empty_root(spot)
}

/// Maps one user and one group into the user namespace, with the same ids as outside.
fn map_only_ourselves(uid: Uid, gid: Gid) -> io::Result<()> {
    let (uid, gid) = (uid.as_raw(), gid.as_raw());
    // The kernel refuses the group's map unless setgroups is denied, since dropping a group could
    // grant access that the group denies.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

fn empty_root(spot: &Path) -> Result<(), JailError> {
    use rustix::{mount, process};
    mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(failed("keep mounts to itself"))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount::mount(
        "none",
        spot,
        "tmpfs",
        flags,
        c"size=4k,nr_inodes=1,mode=555",
    )
    .map_err(failed("mount an empty root"))?;
    process::chdir(spot).map_err(failed("enter the empty root"))?;
    // The old root is mounted over the new one, so `.` leads to the old one.
    process::pivot_root(".", ".").map_err(failed("change the root"))?;
    mount::unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?;
    process::chdir("/").map_err(failed("enter the new root"))
}
