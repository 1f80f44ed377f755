//! Steps into the tree: each opens one entry of an open directory, and cannot leave it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// What identifies an object of the file system while it exists, and, where the file system records
/// times of birth, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Identity {
    device: (u32, u32),
    inode: u64,
    birth: Option<(i64, u32)>,
}

impl Identity {
    /// The identity of the object with these attributes.
    pub(crate) fn of(attributes: &Statx) -> Self {
        let has_birth = attributes.stx_mask & StatxFlags::BTIME.bits() != 0;
        let birth = attributes.stx_btime;
        Self {
            device: (attributes.stx_dev_major, attributes.stx_dev_minor),
            inode: attributes.stx_ino,
            birth: has_birth.then_some((birth.tv_sec, birth.tv_nsec)),
        }
    }

    /// Whether another object could never have the same identity, even after this one's end.
    pub(crate) fn is_lasting(self) -> bool {
        self.birth.is_some()
    }
}

/// No step follows a link, crosses a mount, or leads to a parent.
fn within() -> ResolveFlags {
    ResolveFlags::BENEATH
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_XDEV
}

/// Opens the entry `name` of `directory`. An object that is no regular file is never waited for.
pub(crate) fn open(
    directory: impl AsFd,
    name: &[u8],
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let flags = match flags.contains(OFlags::PATH) {
        true => flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        false => flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
    };
    openat2(directory, name, flags, mode, within())
}

/// Finds the entry `name` of `directory`, without access to its content.
pub(crate) fn find(directory: impl AsFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    open(directory, name, OFlags::PATH, Mode::empty())
}

/// Checks that an open directory still lies below the root of its mount, which is the share's: Linux
/// knows no parent of a directory that was moved out.
pub(crate) fn check_connected(directory: impl AsFd) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match openat2(
        directory,
        c"..",
        flags,
        Mode::empty(),
        ResolveFlags::empty(),
    ) {
        Err(Errno::NOENT) => Err(Errno::STALE),
        Err(error) => Err(error),
        Ok(_parent) => Ok(()),
    }
}

/// The attributes of an open object.
pub(crate) fn attributes_of(object: impl AsFd) -> Result<Statx, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    statx(object, c"", AtFlags::EMPTY_PATH, mask)
}

/// The bits of a mode that tell the kind of an object.
pub(crate) const KIND: u32 = libc::S_IFMT;

/// The kind of an object, as in a mode.
pub(crate) fn kind_of(attributes: &Statx) -> u32 {
    u32::from(attributes.stx_mode) & KIND
}
