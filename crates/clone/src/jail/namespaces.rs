//! Leaving the host's file systems, networks, IPC and names.
//!
//! The new root is an empty, read-only tmpfs: sockets and files are open already, and stay
//! reachable by their descriptors only. A process enters a PID namespace by being born into it,
//! which is its launcher's doing; without `/proc` and with system calls filtered, ids of others
//! are of no use to it anyway.

use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Gid, Uid};
use rustix::thread::UnshareFlags;

use super::{JailError, failed};

/// Moves the process into namespaces of its own with nothing in them. `spot` is any directory to
/// mount the new root on; nobody else sees that.
///
/// Without root it needs a user namespace. Where the host forbids those, the process stays in the
/// host's namespaces, and a warning says so.
pub(super) fn leave_the_host(spot: &Path) -> Result<(), JailError> {
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
    match unsafe { rustix::thread::unshare_unsafe(flags) } {
        Ok(()) => {}
        Err(error) if !uid.is_root() => {
            tracing::warn!(
                %error,
                "this host allows no user namespaces: the VM's process keeps its view of the \
                 host's files, and only rights and system calls are taken away; start it as root, \
                 or allow them (kernel.unprivileged_userns_clone, user.max_user_namespaces)"
            );
            return Ok(());
        }
        Err(error) => return Err(failed("make namespaces")(error)),
    }
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
