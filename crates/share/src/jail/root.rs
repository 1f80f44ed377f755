//! Makes the shared directory the root of all that the process can see.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags};
use rustix::mount::{
    self, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::process;
use rustix::thread::UnshareFlags;

use super::{JailError, JailSpec, failed};

/// Enters new namespaces whose only mount is the directory, without what is mounted below it, and
/// returns the directory.
pub(super) fn enter(spec: &JailSpec<'_>) -> Result<OwnedFd, JailError> {
    let mut flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWCGROUP;
    let (user, group) = (process::geteuid(), process::getegid());
    if !user.is_root() {
        flags |= UnshareFlags::NEWUSER;
    }
    // SAFETY: no flag here splits the table of descriptors, which is what can break I/O safety.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(failed("make namespaces"))?;
    if !user.is_root() {
        map_only_ourselves(user.as_raw(), group.as_raw())
            .map_err(failed("map its user into its namespace"))?;
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount::mount_change("/", private).map_err(failed("keep mounts to itself"))?;
    let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = mount::open_tree(CWD, spec.directory, tree)
        .map_err(failed("take the directory out of its file system"))?;
    let onto = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    mount::move_mount(&tree, "", CWD, spec.spot, onto).map_err(failed("mount the directory"))?;
    process::chdir(spec.spot).map_err(failed("enter the directory"))?;
    protect(spec.read_only)?;
    // The old root is mounted over the new one, so `.` leads to the old one.
    process::pivot_root(".", ".").map_err(failed("change the root"))?;
    mount::unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?;
    process::chdir("/").map_err(failed("enter the new root"))?;
    let found = fs::metadata("/").map_err(failed("look at the directory"))?;
    if (found.dev(), found.ino()) != spec.identity {
        return Err(failed("use the directory")(io::Error::other(
            "it was replaced meanwhile",
        )));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, "/", flags, Mode::empty()).map_err(failed("open the directory"))
}

/// Makes devices and set-user-id programs of the directory ineffective, and the whole of it
/// read-only if wanted. What the host's mount forbids stays forbidden.
fn protect(read_only: bool) -> Result<(), JailError> {
    let now = rustix::fs::statvfs(".")
        .map_err(failed("look at the mount"))?
        .f_flag;
    let kept = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
    for (seen, flag) in kept {
        if now.contains(seen) {
            flags |= flag;
        }
    }
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    mount::mount_remount(".", flags, "").map_err(failed("protect the mount"))
}

/// Maps one user and one group into the user namespace, with the same ids as outside.
fn map_only_ourselves(user: u32, group: u32) -> io::Result<()> {
    // The kernel refuses the group's map unless setgroups is denied.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
}
