//! Requests about checkpoints of VMs.

use army_api::checkpoints::{Checkpoint, Checkpoints, Rewound};
use serde::{Deserialize, Serialize};

super::operations! {
    CheckpointVmRequest = "checkpoint-vm" -> Checkpoint;
    ListCheckpointsRequest = "list-checkpoints" -> Checkpoints;
    RemoveCheckpointRequest = "remove-checkpoint" -> Checkpoints;
    RewindVmRequest = "rewind-vm" -> Rewound;
}

/// See [`NodeApi::checkpoint_vm`](crate::NodeApi::checkpoint_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckpointVmRequest {
    /// The VM's id.
    pub vm: String,
    /// The name of the checkpoint.
    pub name: String,
}

/// See [`NodeApi::list_checkpoints`](crate::NodeApi::list_checkpoints).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ListCheckpointsRequest {
    /// The VM's id.
    pub vm: String,
}

/// See [`NodeApi::remove_checkpoint`](crate::NodeApi::remove_checkpoint).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RemoveCheckpointRequest {
    /// The VM's id.
    pub vm: String,
    /// The name of the checkpoint.
    pub name: String,
}

/// See [`NodeApi::rewind_vm`](crate::NodeApi::rewind_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RewindVmRequest {
    /// The VM's id.
    pub vm: String,
    /// The name of the checkpoint.
    pub checkpoint: String,
}
