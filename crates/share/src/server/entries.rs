//! Names: looking up, making, moving and removing entries of directories.

use std::os::fd::{AsFd, OwnedFd};

use clone_fuse::wire::{Input, MAX_TARGET, Name, Output};
use rustix::fs::{
    AtFlags, FileType, Mode, RenameFlags, linkat, mkdirat, mknodat, readlinkat, renameat_with,
    symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::{Result, Server};
use crate::attributes;
use crate::steps;

/// The bits of a mode that the guest may set: files that run with the rights of their owner on the
/// host are not made.
pub(super) fn allowed_mode(mode: u32, is_directory: bool) -> Mode {
    let allowed = if is_directory { 0o3777 } else { 0o1777 };
    Mode::from_raw_mode(mode & allowed)
}

impl Server {
    pub(super) fn lookup(&mut self, parent: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let name = input.name()?;
        input.end()?;
        self.entry(parent, name)
    }

    /// Finds an entry and tells the guest of it.
    pub(super) fn entry(&mut self, parent: u64, name: Name<'_>) -> Result<Vec<u8>> {
        let directory = self.nodes.directory(parent)?;
        let object = steps::find(&directory, name.as_bytes())?;
        let mut out = Output::new();
        self.put_entry(&mut out, parent, name, object)?;
        Ok(out.into_bytes())
    }

    /// Adds the entry of an object that was found or made.
    pub(super) fn put_entry(
        &mut self,
        out: &mut Output,
        parent: u64,
        name: Name<'_>,
        object: OwnedFd,
    ) -> Result<u64> {
        let found = steps::attributes_of(&object)?;
        let node = self.nodes.tell(parent, name.as_bytes(), object, &found)?;
        attributes::put_entry(out, node, &found, self.settings.owner);
        Ok(node)
    }

    pub(super) fn make_directory(&mut self, parent: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let (mode, _umask) = (input.u32()?, input.u32()?);
        let name = input.name()?;
        input.end()?;
        let directory = self.nodes.directory(parent)?;
        mkdirat(&directory, name.as_bytes(), allowed_mode(mode, true))?;
        self.entry(parent, name)
    }

    pub(super) fn make_node(&mut self, parent: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let (mode, _device) = (input.u32()?, input.u32()?);
        let (_umask, _padding) = (input.u32()?, input.u32()?);
        let name = input.name()?;
        input.end()?;
        let kind = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => FileType::RegularFile,
            libc::S_IFIFO => FileType::Fifo,
            libc::S_IFSOCK => FileType::Socket,
            // A device in the directory would be the host's.
            libc::S_IFCHR | libc::S_IFBLK => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        };
        let directory = self.nodes.directory(parent)?;
        let mode = allowed_mode(mode, false);
        mknodat(&directory, name.as_bytes(), kind, mode, 0)?;
        self.entry(parent, name)
    }

    pub(super) fn symlink(&mut self, parent: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let name = input.name()?;
        let target = input.text()?;
        input.end()?;
        if target.len() > MAX_TARGET {
            return Err(Errno::NAMETOOLONG);
        }
        let directory = self.nodes.directory(parent)?;
        symlinkat(target, &directory, name.as_bytes())?;
        self.entry(parent, name)
    }

    pub(super) fn read_link(&mut self, node: u64) -> Result<Vec<u8>> {
        let link = self.nodes.object(node)?;
        // An empty path with the descriptor of something else is ENOENT.
        let target = readlinkat(&link, c"", Vec::new()).map_err(|error| match error {
            Errno::NOENT => Errno::INVAL,
            other => other,
        })?;
        Ok(target.into_bytes())
    }

    pub(super) fn unlink(
        &mut self,
        parent: u64,
        mut input: Input<'_>,
        is_directory: bool,
    ) -> Result<Vec<u8>> {
        let name = input.name()?;
        input.end()?;
        let directory = self.nodes.directory(parent)?;
        let flags = match is_directory {
            true => AtFlags::REMOVEDIR,
            false => AtFlags::empty(),
        };
        unlinkat(&directory, name.as_bytes(), flags)?;
        Ok(Vec::new())
    }

    pub(super) fn rename(
        &mut self,
        parent: u64,
        mut input: Input<'_>,
        has_flags: bool,
    ) -> Result<Vec<u8>> {
        let new_parent = input.u64()?;
        let flags = match has_flags {
            true => (input.u32()?, input.u32()?).0,
            false => 0,
        };
        let (name, new_name) = (input.name()?, input.name()?);
        input.end()?;
        let flags = RenameFlags::from_bits_retain(flags);
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let from = self.nodes.directory(parent)?;
        let to = self.nodes.directory(new_parent)?;
        renameat_with(&from, name.as_bytes(), &to, new_name.as_bytes(), flags)?;
        self.seen(&to, new_parent, new_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.seen(&from, parent, name);
        }
        Ok(Vec::new())
    }

    /// Remembers the new place of a node that was moved. If somebody else moved it further at once,
    /// the node is stale until the guest looks it up.
    fn seen(&mut self, directory: impl AsFd, parent: u64, name: Name<'_>) {
        let object = steps::find(directory, name.as_bytes());
        let Ok(found) = object.and_then(|object| steps::attributes_of(&object)) else {
            return;
        };
        if let Some(node) = self.nodes.known(&found) {
            self.nodes.moved(node, parent, name.as_bytes());
        }
    }

    pub(super) fn link(&mut self, new_parent: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let node = input.u64()?;
        let new_name = input.name()?;
        input.end()?;
        let object = self.nodes.object(node)?;
        let directory = self.nodes.directory(new_parent)?;
        let to = new_name.as_bytes();
        let by_descriptor = linkat(&object, c"", &directory, to, AtFlags::EMPTY_PATH);
        // Before Linux 6.10, only a name could be linked without a privilege.
        if let Err(Errno::NOENT | Errno::PERM) = by_descriptor {
            let (from, name) = self.nodes.place(node)?;
            linkat(&from, &*name, &directory, to, AtFlags::empty())?;
        } else {
            by_descriptor?;
        }
        self.entry(new_parent, new_name)
    }
}
