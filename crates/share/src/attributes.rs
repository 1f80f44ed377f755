//! Attributes as the guest sees them.

use clone_fuse::wire::Output;
use rustix::fs::{StatVfs, Statx, makedev};

use crate::owner::Owner;

/// How long the guest may believe a name or attributes without asking, in seconds. What others
/// change on the host is seen after that time at the latest.
const VALID_SECONDS: u64 = 1;

/// Adds `struct fuse_attr`.
pub(crate) fn put(out: &mut Output, attributes: &Statx, owner: Owner) {
    let (user, group) = owner.in_guest(attributes.stx_uid, attributes.stx_gid);
    let times = [
        attributes.stx_atime,
        attributes.stx_mtime,
        attributes.stx_ctime,
    ];
    out.u64(attributes.stx_ino)
        .u64(attributes.stx_size)
        .u64(attributes.stx_blocks);
    for time in &times {
        out.u64(time.tv_sec.cast_unsigned());
    }
    for time in &times {
        out.u32(time.tv_nsec);
    }
    let device = makedev(attributes.stx_rdev_major, attributes.stx_rdev_minor);
    out.u32(u32::from(attributes.stx_mode))
        .u32(attributes.stx_nlink)
        .u32(user)
        .u32(group)
        .u32(u32::try_from(device).unwrap_or(0))
        .u32(attributes.stx_blksize)
        .u32(0);
}

/// Adds `struct fuse_attr_out`.
pub(crate) fn put_alone(out: &mut Output, attributes: &Statx, owner: Owner) {
    out.u64(VALID_SECONDS).u32(0).u32(0);
    put(out, attributes, owner);
}

/// Adds `struct fuse_entry_out` of a node.
pub(crate) fn put_entry(out: &mut Output, node: u64, attributes: &Statx, owner: Owner) {
    out.u64(node).u64(0);
    out.u64(VALID_SECONDS).u64(VALID_SECONDS).u32(0).u32(0);
    put(out, attributes, owner);
}

/// Adds `struct fuse_statfs_out`.
pub(crate) fn put_file_system(out: &mut Output, found: &StatVfs) {
    for field in [
        found.f_blocks,
        found.f_bfree,
        found.f_bavail,
        found.f_files,
        found.f_ffree,
    ] {
        out.u64(field);
    }
    for field in [found.f_bsize, found.f_namemax, found.f_frsize] {
        out.u32(u32::try_from(field).unwrap_or(u32::MAX));
    }
    out.zeros(28);
}
