//! The checkpoints of a VM: states of it that it can be set back to, and their tree.
//!
//! A checkpoint is a value in the VM's process. Its layers are files without a name, so nothing is
//! left of it whatever ends, and a layer's file is closed with the last checkpoint that needs it.
//! How checkpoints are taken and used is handled elsewhere (`checkpointing.rs`, `rewind.rs`).

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use clone_api::checkpoints::{CheckpointInfo, CheckpointList, CheckpointName, MAX_CHECKPOINTS};
use clone_api::{ApiError, ErrorCode};
use clone_disk::DiskPoint;
use clone_memory::LayerStack;
use clone_start::error::Result;
use clone_vmm::machine::MachineState;

/// A state of the VM.
pub(super) struct Checkpoint {
    /// What is told of it. Its parent is the next one above it that still exists.
    pub(super) info: CheckpointInfo,
    /// Whether the guest had an agent.
    pub(super) has_agent: bool,
    /// CPUs, board and devices.
    pub(super) state: MachineState,
    /// The content of memory: the layers that were mapped, and those of checkpoints.
    pub(super) memory: LayerStack,
    /// The layers that were mapped; `None` for RAM that was not made from layers.
    pub(super) mapped: Option<LayerStack>,
    /// The content of each disk, by its index; `None` for those that the guest only reads.
    pub(super) disks: Vec<Option<CheckpointDisk>>,
}

/// The content of a disk.
pub(super) struct CheckpointDisk {
    pub(super) point: DiskPoint,
    /// The number of its layers that belong to the VM's parent.
    pub(super) parent_layers: usize,
}

/// The checkpoints of one VM.
#[derive(Default)]
pub(super) struct Checkpoints {
    by_name: BTreeMap<CheckpointName, Checkpoint>,
    /// The checkpoint that the VM was last at.
    present: Option<CheckpointName>,
}

impl Checkpoints {
    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Returns an error unless there is room for a new checkpoint of this name.
    pub(super) fn check_new(&self, name: &CheckpointName) -> Result<()> {
        if self.by_name.contains_key(name) {
            let message = format!("the VM has a checkpoint `{name}` already");
            return Err(ApiError::new(ErrorCode::Conflict, message)
                .advise("choose another name, or remove that one first"));
        }
        if self.by_name.len() >= MAX_CHECKPOINTS {
            let message = format!("the VM has {MAX_CHECKPOINTS} checkpoints, the most it can have");
            return Err(
                ApiError::new(ErrorCode::Conflict, message).advise("remove one that is not needed")
            );
        }
        Ok(())
    }

    /// The checkpoint that the VM was last at.
    pub(super) fn present(&self) -> Option<&CheckpointName> {
        self.present.as_ref()
    }

    /// Adds a checkpoint, at which the VM is now. Its name must be new.
    pub(super) fn add(&mut self, checkpoint: Checkpoint) {
        let name = checkpoint.info.name.clone();
        self.present = Some(name.clone());
        self.by_name.insert(name, checkpoint);
    }

    /// The checkpoint of this name.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`].
    pub(super) fn get(&self, name: &CheckpointName) -> Result<&Checkpoint> {
        self.by_name.get(name).ok_or_else(|| not_found(name))
    }

    /// Records that the VM is at this checkpoint.
    pub(super) fn set_present(&mut self, name: &CheckpointName) {
        self.present = Some(name.clone());
    }

    /// Removes a checkpoint. Those that came from it, and the VM, come from its parent then.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`].
    pub(super) fn remove(&mut self, name: &CheckpointName) -> Result<()> {
        let removed = self.by_name.remove(name).ok_or_else(|| not_found(name))?;
        let parent = removed.info.parent;
        let children = self.by_name.values_mut().map(|it| &mut it.info.parent);
        for from in children.chain([&mut self.present]) {
            if from.as_ref() == Some(name) {
                from.clone_from(&parent);
            }
        }
        Ok(())
    }

    /// What is told of all checkpoints.
    pub(super) fn list(&self) -> CheckpointList {
        let mut checkpoints: Vec<CheckpointInfo> =
            self.by_name.values().map(|it| it.info.clone()).collect();
        checkpoints.sort_by(|a, b| {
            let key = |it: &CheckpointInfo| (it.created_unix_ms, it.name.clone());
            key(a).cmp(&key(b))
        });
        CheckpointList {
            checkpoints,
            present: self.present.clone(),
            used_bytes: self.used_bytes(),
        }
    }

    /// The room that all layers of checkpoints take on the host's disk, each counted once. Layers
    /// below them, which the VM has in any case, are not counted.
    fn used_bytes(&self) -> u64 {
        let mut files = BTreeMap::new();
        for checkpoint in self.by_name.values() {
            let below = checkpoint.mapped.as_ref().map_or(0, |it| it.layers().len());
            for layer in &checkpoint.memory.layers()[below..] {
                let bytes = layer.file().metadata().map_or(0, |it| it.blocks() * 512);
                files.insert(std::ptr::from_ref(layer.file()) as usize, bytes);
            }
            for disk in checkpoint.disks.iter().flatten() {
                for (file, bytes) in disk.point.layer_files(disk.parent_layers) {
                    files.insert(Arc::as_ptr(file) as usize, bytes);
                }
            }
        }
        files.values().sum()
    }
}

fn not_found(name: &CheckpointName) -> ApiError {
    ApiError::new(
        ErrorCode::NotFound,
        format!("the VM has no checkpoint `{name}`"),
    )
    .advise("`clone checkpoint ls` lists those that it has")
}
