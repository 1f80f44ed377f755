//! Regular files: opening, making and closing them. Their content is read and written by the VM's
//! process.

use clone_fuse::wire::{Input, Output};
use rustix::fs::OFlags;
use rustix::io::{Errno, fcntl_dupfd_cloexec};

use super::entries::allowed_mode;
use super::{Answer, Result, Server};
use crate::handles::{self, open_flags};
use crate::steps;

/// Adds `struct fuse_open_out`. The guest keeps no cache of a file that was closed meanwhile, since
/// others may have written it.
pub(super) fn put_open(out: &mut Output, handle: u64) {
    out.u64(handle).u32(0).u32(0);
}

impl Server {
    pub(super) fn open(&mut self, node: u64, mut input: Input<'_>) -> Result {
        let (flags, _open_flags) = (input.u32()?, input.u32()?);
        self.handles.check_room()?;
        let file = handles::open_for(&mut self.nodes, node, flags)?;
        // The object of the node itself is open while the handle is.
        self.nodes.object(node)?;
        let kept = open_flags(flags);
        let handle = self.handles.add(&mut self.nodes, (node, kept), file)?;
        let mut out = Output::new();
        put_open(&mut out, handle);
        self.opened(out, handle)
    }

    /// Makes a file and opens it; `is_unnamed` for one that has no name yet.
    pub(super) fn create(&mut self, parent: u64, mut input: Input<'_>, is_unnamed: bool) -> Result {
        let (flags, mode) = (input.u32()?, input.u32()?);
        let (_umask, _open_flags) = (input.u32()?, input.u32()?);
        let name = input.name()?;
        input.end()?;
        self.handles.check_room()?;
        let directory = self.nodes.directory(parent)?;
        let mode = allowed_mode(mode, false);
        let kept = open_flags(flags).difference(OFlags::DIRECTORY);
        let file = match is_unnamed {
            true => steps::open(&directory, b".", kept | OFlags::TMPFILE, mode),
            false => {
                let how = OFlags::from_bits_retain(flags) & (OFlags::EXCL | OFlags::TRUNC);
                let flags = kept | how | OFlags::CREATE;
                steps::open(&directory, name.as_bytes(), flags, mode)
            }
        }?;
        let found = steps::attributes_of(&file)?;
        if steps::kind_of(&found) != libc::S_IFREG {
            return Err(Errno::OPNOTSUPP);
        }
        let object = fcntl_dupfd_cloexec(&file, 3)?;
        let known_as: &[u8] = if is_unnamed { b"" } else { name.as_bytes() };
        let node = self.nodes.tell(parent, known_as, object, &found)?;
        let mut out = Output::new();
        crate::attributes::put_entry(&mut out, node, &found, self.settings.owner);
        let handle = self.handles.add(&mut self.nodes, (node, kept), file)?;
        put_open(&mut out, handle);
        self.opened(out, handle)
    }

    fn opened(&mut self, out: Output, handle: u64) -> Result {
        Ok(Answer {
            content: out.into_bytes(),
            file: Some(self.handles.file(&mut self.nodes, handle)?),
        })
    }

    pub(super) fn release(&mut self, mut input: Input<'_>) -> Result<Vec<u8>> {
        let handle = input.u64()?;
        self.handles.close(&mut self.nodes, handle)?;
        Ok(Vec::new())
    }
}
