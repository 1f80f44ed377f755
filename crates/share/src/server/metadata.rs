//! Attributes of files, and of the file system.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use clone_fuse::wire::{Input, Output};
use rustix::fs::{AtFlags, Mode, OFlags, Timestamps, fstatvfs, ftruncate, utimensat};
use rustix::fs::{Timespec, UTIME_NOW, UTIME_OMIT, syncfs};
use rustix::io::Errno;

use super::entries::allowed_mode;
use super::{Result, Server};
use crate::attributes;
use crate::handles;
use crate::steps;

/// `FATTR_*`: which fields of a `fuse_setattr_in` count.
mod valid {
    pub(super) const MODE: u32 = 1;
    pub(super) const USER: u32 = 1 << 1;
    pub(super) const GROUP: u32 = 1 << 2;
    pub(super) const SIZE: u32 = 1 << 3;
    pub(super) const ATIME: u32 = 1 << 4;
    pub(super) const MTIME: u32 = 1 << 5;
    pub(super) const HANDLE: u32 = 1 << 6;
    pub(super) const ATIME_NOW: u32 = 1 << 7;
    pub(super) const MTIME_NOW: u32 = 1 << 8;
}

/// `struct fuse_setattr_in`.
struct Changes {
    valid: u32,
    handle: u64,
    size: u64,
    times: [(u64, u32); 2],
    mode: u32,
    user: u32,
    group: u32,
}

impl Changes {
    fn decode(mut input: Input<'_>) -> Result<Self> {
        let (valid, _padding) = (input.u32()?, input.u32()?);
        let (handle, size, _lock_owner) = (input.u64()?, input.u64()?, input.u64()?);
        let seconds = [input.u64()?, input.u64()?, input.u64()?];
        let nanoseconds = [input.u32()?, input.u32()?, input.u32()?];
        let (mode, _unused) = (input.u32()?, input.u32()?);
        Ok(Self {
            valid,
            handle,
            size,
            times: [(seconds[0], nanoseconds[0]), (seconds[1], nanoseconds[1])],
            mode,
            user: input.u32()?,
            group: input.u32()?,
        })
    }

    fn has(&self, field: u32) -> bool {
        self.valid & field != 0
    }

    fn time(&self, index: usize, (set, now): (u32, u32)) -> Timespec {
        let (seconds, nanoseconds) = self.times[index];
        let (tv_sec, tv_nsec) = match () {
            () if self.has(now) => (0, UTIME_NOW),
            () if self.has(set) => (seconds.cast_signed(), nanoseconds.into()),
            () => (0, UTIME_OMIT),
        };
        Timespec { tv_sec, tv_nsec }
    }
}

impl Server {
    pub(super) fn get_attributes(&mut self, node: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let (flags, _padding, handle) = (input.u32()?, input.u32()?, input.u64()?);
        const BY_HANDLE: u32 = 1;
        let object = match flags & BY_HANDLE != 0 {
            true => self.handles.file(&mut self.nodes, handle)?,
            false => self.nodes.object(node)?,
        };
        self.attributes(&object)
    }

    fn attributes(&self, object: &OwnedFd) -> Result<Vec<u8>> {
        let found = steps::attributes_of(object)?;
        let mut out = Output::new();
        attributes::put_alone(&mut out, &found, self.settings.owner);
        Ok(out.into_bytes())
    }

    pub(super) fn set_attributes(&mut self, node: u64, input: Input<'_>) -> Result<Vec<u8>> {
        let changes = Changes::decode(input)?;
        let handle = match changes.has(valid::HANDLE) {
            true => Some(self.handles.file(&mut self.nodes, changes.handle)?),
            false => None,
        };
        let object = match &handle {
            Some(file) => Rc::clone(file),
            None => self.nodes.object(node)?,
        };
        if changes.has(valid::USER) || changes.has(valid::GROUP) {
            let found = steps::attributes_of(&object)?;
            let wanted = |field, id| changes.has(field).then_some(id);
            let new = (
                wanted(valid::USER, changes.user),
                wanted(valid::GROUP, changes.group),
            );
            let now = (found.stx_uid, found.stx_gid);
            if !self.settings.owner.is_unchanged(now, new) {
                return Err(Errno::PERM);
            }
        }
        if changes.has(valid::MODE) {
            let kind = steps::kind_of(&steps::attributes_of(&object)?);
            let mode = allowed_mode(changes.mode, kind == libc::S_IFDIR);
            change_mode(object.as_fd(), mode)?;
        }
        if changes.has(valid::SIZE) {
            match &handle {
                Some(file) => ftruncate(file, changes.size)?,
                None => {
                    let file = handles::open(&mut self.nodes, node, OFlags::WRONLY)?;
                    ftruncate(&file, changes.size)?;
                }
            }
        }
        let times = valid::ATIME | valid::MTIME | valid::ATIME_NOW | valid::MTIME_NOW;
        if changes.has(times) {
            let times = Timestamps {
                last_access: changes.time(0, (valid::ATIME, valid::ATIME_NOW)),
                last_modification: changes.time(1, (valid::MTIME, valid::MTIME_NOW)),
            };
            utimensat(&object, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        self.attributes(&object)
    }

    pub(super) fn file_system(&self) -> Result<Vec<u8>> {
        let mut out = Output::new();
        attributes::put_file_system(&mut out, &fstatvfs(self.nodes.root())?);
        Ok(out.into_bytes())
    }

    pub(super) fn sync_file_system(&mut self) -> Result<Vec<u8>> {
        let root = self.nodes.root().clone();
        let directory = steps::open(&root, b".", OFlags::DIRECTORY, Mode::empty())?;
        syncfs(&directory)?;
        Ok(Vec::new())
    }
}

/// Changes the mode of an object whose descriptor may have no access to its content
/// (`fchmodat2`, Linux 6.6).
fn change_mode(object: BorrowedFd<'_>, mode: Mode) -> Result<()> {
    // SAFETY: the path is a string that lives as long as the program, and the call writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fchmodat2,
            object.as_raw_fd(),
            c"".as_ptr(),
            mode.as_raw_mode(),
            libc::AT_EMPTY_PATH,
        )
    };
    match result {
        0 => Ok(()),
        _ => {
            let error = std::io::Error::last_os_error();
            Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        }
    }
}
