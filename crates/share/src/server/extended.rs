//! Extended attributes. Only those of users (`user.*`) are the guest's: the others mean something to
//! the host.

use clone_fuse::wire::{Input, MAX_NAME, MAX_XATTR, Output};
use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lremovexattr, lsetxattr};
use rustix::io::Errno;
use rustix::process::fchdir;

use super::{Result, Server};
use crate::steps::{self, Identity};

/// The prefix of the attributes that a guest may have.
const PREFIX: &[u8] = b"user.";

impl Server {
    /// Makes the node's directory the working directory, and returns the node's name there: Linux
    /// has no such calls for descriptors of every kind of object. The calls follow no link.
    fn enter_place(&mut self, node: u64) -> Result<Box<[u8]>> {
        let identity = self.nodes.get(node)?.identity;
        if self.nodes.get(node)?.parent.is_none() {
            fchdir(self.nodes.root())?;
            return Ok((*b".").into());
        }
        let (directory, name) = self.nodes.place(node)?;
        let object = steps::find(&directory, &name).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR => Errno::STALE,
            other => other,
        })?;
        if Identity::of(&steps::attributes_of(&object)?) != identity {
            return Err(Errno::STALE);
        }
        fchdir(&*directory)?;
        Ok(name)
    }

    pub(super) fn set_extended(&mut self, node: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let (size, flags) = (input.u32()? as usize, input.u32()?);
        let name = user_name(input.text()?)?;
        if size > MAX_XATTR {
            return Err(Errno::TOOBIG);
        }
        let value = input.bytes(size)?;
        input.end()?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let place = self.enter_place(node)?;
        lsetxattr(&*place, name, value, flags)?;
        Ok(Vec::new())
    }

    pub(super) fn get_extended(&mut self, node: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let (size, _padding) = (input.u32()? as usize, input.u32()?);
        let name = user_name(input.text()?)?;
        let place = self.enter_place(node)?;
        let mut value = vec![0; MAX_XATTR];
        let len = lgetxattr(&*place, name, &mut value[..])?;
        value.truncate(len);
        sized(value, size)
    }

    pub(super) fn list_extended(&mut self, node: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let (size, _padding) = (input.u32()? as usize, input.u32()?);
        let place = self.enter_place(node)?;
        let mut names = vec![0; MAX_XATTR];
        let len = llistxattr(&*place, &mut names[..])?;
        names.truncate(len);
        let all = names.split_inclusive(|byte| *byte == 0);
        let own: Vec<u8> = all
            .filter(|it| it.starts_with(PREFIX))
            .flatten()
            .copied()
            .collect();
        sized(own, size)
    }

    pub(super) fn remove_extended(&mut self, node: u64, mut input: Input<'_>) -> Result<Vec<u8>> {
        let name = user_name(input.text()?)?;
        input.end()?;
        let place = self.enter_place(node)?;
        lremovexattr(&*place, name)?;
        Ok(Vec::new())
    }
}

fn user_name(name: &[u8]) -> Result<&[u8]> {
    match name.strip_prefix(PREFIX) {
        None | Some(b"") => Err(Errno::OPNOTSUPP),
        Some(_) if name.len() > MAX_NAME => Err(Errno::RANGE),
        Some(_) => Ok(name),
    }
}

/// The value, if the guest has room for `size` bytes of it, or its length if it asks for that.
fn sized(value: Vec<u8>, size: usize) -> Result<Vec<u8>> {
    match size {
        0 => {
            let mut out = Output::new();
            out.u32(value.len() as u32).u32(0);
            Ok(out.into_bytes())
        }
        _ if value.len() > size => Err(Errno::RANGE),
        _ => Ok(value),
    }
}
