//! Leaving the host's file systems, networks, IPC and names.
//!
//! The new root is an empty, read-only tmpfs: sockets and files are open already, and stay
//! reachable by their descriptors only. The process stays in its launcher's PID namespace, as a
//! process enters one only by being born into it. Ids of other processes are of no use to it:
//! there is no `/proc`, its user id is its own, and no system call that takes one is allowed.

use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Gid, Uid};
use rustix::thread::UnshareFlags;

use super::{JailError, Layer, failed};

/// Moves the process into namespaces of its own with nothing in them. `spot` is any directory to
/// mount the new root on; nobody else sees that.
///
/// Without root it needs a user namespace. Where the host forbids those, this layer is missing.
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

/// In the user namespace there is one user and one group, with the ids they have outside.
fn map_only_ourselves(uid: Uid, gid: Gid) -> io::Result<()> {
    let (uid, gid) = (uid.as_raw(), gid.as_raw());
    // Without this the group's map is refused: groups could be dropped that deny something.
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
    // The old root is put over the new one, and is then the first that `.` leads to.
    process::pivot_root(".", ".").map_err(failed("change the root"))?;
    mount::unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?;
    process::chdir("/").map_err(failed("enter the new root"))
}
