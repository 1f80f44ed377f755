//! Directories: opening and reading them.

use std::mem::MaybeUninit;

use clone_fuse::link::MAX_CONTENT;
use clone_fuse::wire::{ENTRY_BYTES, Input, Name, Output};
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom, fsync, seek};
use rustix::io::Errno;

use super::files::put_open;
use super::{Result, Server};
use crate::handles;

/// The bytes of `struct fuse_dirent` before the name.
const ENTRY_HEADER: usize = 24;

impl Server {
    pub(super) fn open_directory(&mut self, node: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let (_flags, _open_flags) = (input.u32()?, input.u32()?);
        self.handles.check_room()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let directory = handles::open(&mut self.nodes, node, flags)?;
        let handle = self
            .handles
            .add(&mut self.nodes, (node, flags), directory)?;
        let mut out = Output::new();
        put_open(&mut out, handle);
        Ok(out.into_bytes())
    }

    /// Reads entries from an offset on; `has_attributes` tells the guest of each of them as a lookup
    /// would.
    pub(super) fn read_directory(
        &mut self,
        node: u64,
        mut input: Input<'_>,
        has_attributes: bool,
    ) -> Result<Vec<u8>> {
        let (handle, offset, size) = (input.u64()?, input.u64()?, input.u32()?);
        if !self.handles.is_directory(handle)? {
            return Err(Errno::NOTDIR);
        }
        let directory = self.handles.file(&mut self.nodes, handle)?;
        let room = (size as usize).min(MAX_CONTENT);
        seek(&directory, SeekFrom::Start(offset))?;
        let mut buffer = vec![MaybeUninit::uninit(); room.clamp(1024, 32 << 10)];
        let mut entries = RawDir::new(&directory, &mut buffer);
        let mut out = Output::new();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let record = ENTRY_HEADER + name.len().next_multiple_of(8);
            let needed = record + if has_attributes { ENTRY_BYTES } else { 0 };
            if out.len() + needed > room {
                break;
            }
            if has_attributes {
                self.put_attributes(&mut out, node, name);
            }
            out.u64(entry.ino())
                .u64(entry.next_entry_cookie())
                .u32(name.len() as u32)
                .u32(kind_number(entry.file_type()))
                .bytes(name)
                .zeros(record - ENTRY_HEADER - name.len());
        }
        Ok(out.into_bytes())
    }

    /// Adds what a lookup of the entry gives, or zeros: the guest looks it up itself then. The
    /// directory and its parent are not looked up.
    fn put_attributes(&mut self, out: &mut Output, parent: u64, name: &[u8]) {
        let found = Name::new(name).and_then(|name| self.entry(parent, name));
        match found {
            Ok(entry) => out.bytes(&entry),
            Err(_) => out.zeros(ENTRY_BYTES),
        };
    }

    pub(super) fn sync_directory(&mut self, mut input: Input<'_>) -> Result<Vec<u8>> {
        let handle = input.u64()?;
        fsync(&*self.handles.file(&mut self.nodes, handle)?)?;
        Ok(Vec::new())
    }
}

/// `DT_*`.
fn kind_number(kind: FileType) -> u32 {
    // The number is the mode's kind, shifted.
    match kind {
        FileType::Unknown => 0,
        kind => kind.as_raw_mode() >> 12,
    }
}
