//! The files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::fs::{Mode, OFlags, ftruncate};
use rustix::io::Errno;

use crate::nodes::Nodes;
use crate::steps::{self, Identity};

/// The most handles.
pub(crate) const MAX_HANDLES: usize = 8 << 10;

/// A file or directory that the guest has open.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) node: u64,
    /// The flags with which it is opened ([`open_flags`]).
    pub(crate) flags: OFlags,
    /// The open file; opened when it is needed, after the table was taken over.
    file: Option<Rc<OwnedFd>>,
}

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    handles: HashMap<u64, Handle>,
    next: u64,
}

/// The flags of an open that matter on the host. Where writes are appended is decided by each write,
/// the guest's own cache takes the place of direct access, and what must not wait never does.
pub(crate) fn open_flags(guest: u32) -> OFlags {
    let kept = OFlags::ACCMODE | OFlags::DSYNC | OFlags::SYNC | OFlags::DIRECTORY;
    OFlags::from_bits_retain(guest) & kept
}

impl Handles {
    /// Checks that there is room for one more.
    pub(crate) fn check_room(&self) -> Result<(), Errno> {
        match self.handles.len() < MAX_HANDLES {
            true => Ok(()),
            false => Err(Errno::NFILE),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Handle)> {
        self.handles
            .iter()
            .map(|(number, handle)| (*number, handle))
    }

    /// The number of the next handle.
    pub(crate) fn next_number(&self) -> u64 {
        self.next
    }

    /// Adds an open file of a node, and returns its number.
    pub(crate) fn add(
        &mut self,
        nodes: &mut Nodes,
        (node, flags): (u64, OFlags),
        file: OwnedFd,
    ) -> Result<u64, Errno> {
        self.check_room()?;
        let file = Rc::new(file);
        let number = self.next;
        self.next += 1;
        nodes.opened(node, Some(Rc::clone(&file)));
        let file = Some(file);
        self.handles.insert(number, Handle { node, flags, file });
        Ok(number)
    }

    /// Takes over a handle of a saved table.
    pub(crate) fn restore(
        &mut self,
        nodes: &mut Nodes,
        number: u64,
        (node, flags): (u64, OFlags),
    ) -> Result<(), Errno> {
        let is_new = !self.handles.contains_key(&number);
        if !is_new || self.check_room().is_err() {
            return Err(Errno::INVAL);
        }
        nodes.opened(node, None);
        let file = None;
        self.handles.insert(number, Handle { node, flags, file });
        self.next = self.next.max(number.saturating_add(1));
        Ok(())
    }

    /// Sets the number of the next handle, which the guest was never told.
    pub(crate) fn continue_at(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// The open file of a handle. A handle of a saved table is opened, if its file is still where it
    /// was.
    pub(crate) fn file(&mut self, nodes: &mut Nodes, number: u64) -> Result<Rc<OwnedFd>, Errno> {
        let handle = self.handles.get_mut(&number).ok_or(Errno::BADF)?;
        if let Some(file) = &handle.file {
            return Ok(Rc::clone(file));
        }
        let file = Rc::new(open(nodes, handle.node, handle.flags)?);
        handle.file = Some(Rc::clone(&file));
        Ok(file)
    }

    /// Whether a handle is of a directory.
    pub(crate) fn is_directory(&self, number: u64) -> Result<bool, Errno> {
        let handle = self.handles.get(&number).ok_or(Errno::BADF)?;
        Ok(handle.flags.contains(OFlags::DIRECTORY))
    }

    /// Closes a handle.
    pub(crate) fn close(&mut self, nodes: &mut Nodes, number: u64) -> Result<(), Errno> {
        let handle = self.handles.remove(&number).ok_or(Errno::BADF)?;
        nodes.closed(handle.node);
        Ok(())
    }
}

/// Opens the content of a node, which must be a regular file or a directory.
pub(crate) fn open(nodes: &mut Nodes, node: u64, flags: OFlags) -> Result<OwnedFd, Errno> {
    let (kind, identity) = {
        let node = nodes.get(node)?;
        (node.kind, node.identity)
    };
    match (kind, flags.contains(OFlags::DIRECTORY)) {
        (libc::S_IFDIR, true) => {
            let directory = nodes.directory(node)?;
            return steps::open(&directory, b".", flags, Mode::empty());
        }
        (libc::S_IFREG, false) => {}
        (libc::S_IFDIR, false) => return Err(Errno::ISDIR),
        (_, true) => return Err(Errno::NOTDIR),
        _ => return Err(Errno::OPNOTSUPP),
    }
    let (directory, name) = nodes.place(node)?;
    let file = match steps::open(&directory, &name, flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Err(Errno::STALE),
        opened => opened,
    }?;
    // Another object may have taken the name meanwhile.
    match Identity::of(&steps::attributes_of(&file)?) == identity {
        true => Ok(file),
        false => Err(Errno::STALE),
    }
}

/// Opens the content of a regular file, and empties it if the guest asked for that.
pub(crate) fn open_for(nodes: &mut Nodes, node: u64, guest: u32) -> Result<OwnedFd, Errno> {
    let file = open(nodes, node, open_flags(guest))?;
    // Only now is it known that it is the right file.
    if OFlags::from_bits_retain(guest).contains(OFlags::TRUNC) {
        ftruncate(&file, 0)?;
    }
    Ok(file)
}
