//! Freezes a disk: everything written so far becomes read-only, and a new top layer takes writes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::FlockOperation;

use super::{Disk, Stack};
use crate::block_map::BlockMap;
use crate::engine::{Op, Target};
use crate::error::{DiskError, io_error};
use crate::layer::{self, LayerHeader};
use crate::op_kind::OpKind;
use crate::room::{self, Room};

/// A new, empty top layer, over layers that are known.
pub struct NewTop {
    pub(super) header: LayerHeader,
    pub(super) file: Arc<File>,
    pub(super) room: Option<Room>,
}

impl NewTop {
    /// Makes the layer in `file`, over `layers` and a base image of `size` bytes.
    pub(super) fn create(
        file: File,
        size: u64,
        layers: &[LayerHeader],
        durable: bool,
    ) -> Result<Self, DiskError> {
        let parent = layers.last();
        let mut header = LayerHeader::new(size, parent.map(|parent| parent.id))?;
        header.block_size = parent.map_or(header.block_size, |parent| parent.block_size);
        Stack::check_next(layers, size, &header)?;
        layer::create(&file, &header)?;
        let file = Arc::new(file);
        let room = room::of_layer(&file, durable)?;
        Ok(Self { header, file, room })
    }
}

impl Disk {
    /// The layers over the base image, lowest first; empty for a plain image.
    pub fn layers(&self) -> &[LayerHeader] {
        self.stack.as_ref().map_or(&[], |stack| &stack.layers)
    }

    /// The file of the layer at `index` in [`Disk::layers`], so that it can be copied while the
    /// disk is frozen.
    pub fn layer_file(&self, index: usize) -> Option<Arc<File>> {
        match self.engine.targets().get(index + 1)? {
            Target::File(file) => Some(Arc::clone(file)),
            Target::Qcow2(_) => None,
        }
    }

    /// Writes the map to the top layer's file, so that it can be opened elsewhere; with `sync`,
    /// durably. No request may be in flight. Does nothing without a writable top layer.
    ///
    /// # Errors
    /// [`DiskError::Io`]; the disk can still be used.
    pub fn seal(&mut self, sync: bool) -> Result<(), DiskError> {
        self.require_idle()?;
        let Some(stack) = self.stack.as_mut().filter(|stack| stack.writable) else {
            return Ok(());
        };
        let number = stack.top_number();
        let Target::File(file) = &self.engine.targets()[usize::from(number)] else {
            return Ok(());
        };
        let durable = |file: &File| match sync {
            true => file
                .sync_data()
                .map_err(io_error("make the top layer durable")),
            false => Ok(()),
        };
        durable(file)?;
        while let Some(&index) = stack.dirty.first() {
            let leaf = stack.map.top_leaf(index, number);
            file.write_all_at(&leaf, LayerHeader::leaf_offset(index))
                .map_err(io_error("write the map of the top layer"))?;
            stack.dirty.pop_first();
        }
        durable(file)
    }

    /// Makes everything written so far read-only, and sends later writes to a new layer in
    /// `new_top`, an empty file open for reading and writing. `durable` says whether flushes must
    /// make that layer durable. No request may be in flight.
    ///
    /// Afterwards, the last but one of [`Disk::layers`] is the frozen layer, which other disks may
    /// use. If there was no layer, the base image itself is frozen.
    ///
    /// # Errors
    /// [`DiskError::Mismatch`] for a read-only disk, [`DiskError::Io`] for errors of the host. The
    /// disk continues unchanged.
    pub fn freeze(&mut self, new_top: File, durable: bool) -> Result<(), DiskError> {
        self.require_idle()?;
        if self.read_only {
            return Err(DiskError::Mismatch(
                "a read-only disk cannot be frozen".to_owned(),
            ));
        }
        // Data that the guest flushes later may be in the frozen part.
        let keep = self.stack.as_ref().is_none_or(|stack| stack.durable);
        self.seal(keep)?;
        if self.stack.is_none() {
            let sync = Op {
                target: 0,
                offset: 0,
                kind: OpKind::Sync,
            };
            sync.execute(&self.engine.targets()[0])
                .map_err(io_error("make the base image durable"))?;
        }
        let top = NewTop::create(new_top, self.size, self.layers(), durable)?;
        self.share_top();

        let mut targets = self.engine.targets().to_vec();
        targets.push(Target::File(top.file));
        self.engine.set_targets(targets);
        let stack = self
            .stack
            .get_or_insert_with(|| Stack::new(true, Vec::new(), BlockMap::default()));
        stack.map.freeze_top();
        stack.layers.push(top.header);
        stack.writable = true;
        stack.durable = durable;
        stack.room = top.room;
        Ok(())
    }

    /// Changes the lock to a shared one, so that other processes can open the frozen layer.
    fn share_top(&self) {
        if let Some(Target::File(file)) = self.engine.targets().last() {
            // This fails only on file systems without locks, where there is no lock to change.
            let _ = rustix::fs::flock(file, FlockOperation::NonBlockingLockShared);
        }
    }

    pub(super) fn require_idle(&self) -> Result<(), DiskError> {
        if self.is_idle() {
            return Ok(());
        }
        Err(DiskError::Mismatch(
            "the disk still has requests in flight".to_owned(),
        ))
    }
}
