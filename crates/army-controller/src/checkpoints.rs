//! Checkpoints of VMs, and rewinding them. They are on the VM's host, and the database has only the
//! events.

use army_api::checkpoints::{Checkpoint, Checkpoints, Rewind, Rewound, TakeCheckpoint};
use army_api::vms::{Vm, VmState};
use army_node_api::requests::{
    CheckpointVmRequest, ListCheckpointsRequest, RemoveCheckpointRequest, RewindVmRequest,
};

use crate::{Controller, Result, deadlines};

impl Controller {
    /// Takes a checkpoint of a VM, which continues to run. A suspended VM is woken.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`](crate::ErrorKind::Conflict) where the name is taken, the VM has too
    /// many, or one of its disks cannot be set back.
    pub async fn checkpoint(&self, vm: &Vm, request: TakeCheckpoint) -> Result<Checkpoint> {
        let node = self.node_of(vm)?;
        if vm.state == VmState::Suspended {
            self.resume(vm).await?;
        }
        let request = CheckpointVmRequest {
            vm: vm.id.clone(),
            name: request.name,
        };
        let taken = node.checkpoint_vm(request, deadlines::transfer()).await?;
        let event = self
            .store
            .record_vm_event("vm.checkpointed", vm, &taken.name);
        event.await?;
        Ok(taken)
    }

    /// The checkpoints of a VM.
    pub async fn checkpoints(&self, vm: &Vm) -> Result<Checkpoints> {
        let request = ListCheckpointsRequest { vm: vm.id.clone() };
        let node = self.node_of(vm)?;
        Ok(node
            .list_checkpoints(request, deadlines::operation())
            .await?)
    }

    /// Removes a checkpoint of a VM, and returns the others.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where there is no such checkpoint.
    pub async fn remove_checkpoint(&self, vm: &Vm, name: &str) -> Result<Checkpoints> {
        let request = RemoveCheckpointRequest {
            vm: vm.id.clone(),
            name: name.to_owned(),
        };
        let node = self.node_of(vm)?;
        Ok(node
            .remove_checkpoint(request, deadlines::operation())
            .await?)
    }

    /// Sets a VM back to a checkpoint.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where there is no such checkpoint.
    pub async fn rewind(&self, vm: &Vm, request: Rewind) -> Result<Rewound> {
        let request = RewindVmRequest {
            vm: vm.id.clone(),
            checkpoint: request.checkpoint,
        };
        let node = self.node_of(vm)?;
        let rewound = node.rewind_vm(request, deadlines::operation()).await?;
        let event = self
            .store
            .record_vm_event("vm.rewound", vm, &rewound.checkpoint);
        event.await?;
        Ok(rewound)
    }
}
