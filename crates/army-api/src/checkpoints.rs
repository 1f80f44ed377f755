//! Checkpoints: states of a running VM that it can be rewound to.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A request to take a checkpoint of a running VM. The VM itself continues to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeCheckpoint {
    /// The name of the checkpoint, by the rules for the names of VMs.
    #[schema(max_length = 48)]
    pub name: String,
}

/// A checkpoint of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Checkpoint {
    /// The name of the checkpoint.
    pub name: String,
    /// The checkpoint that the VM was at when this one was taken, or the next one before that which
    /// still exists. It is absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The time at which the checkpoint was taken, in milliseconds since 1970.
    pub created_ms: u64,
    /// The memory that had changed since the parent and is held by the checkpoint, in bytes.
    pub memory_bytes: u64,
    /// The content of disks that had been written since the parent and is held by the checkpoint, in
    /// bytes.
    pub disk_bytes: u64,
}

/// The checkpoints of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Checkpoints {
    /// The checkpoints, the oldest first; at most 32.
    pub checkpoints: Vec<Checkpoint>,
    /// The checkpoint that was last taken, or that the VM was last rewound to. It is absent if there
    /// is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub present: Option<String>,
    /// The room that all checkpoints take together on the disk of the VM's host, in bytes.
    pub used_bytes: u64,
}

/// A request to set a VM back to one of its checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rewind {
    /// The name of the checkpoint.
    #[schema(max_length = 48)]
    pub checkpoint: String,
}

/// A VM that was set back to a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rewound {
    /// The name of the checkpoint.
    pub checkpoint: String,
    /// Whether the VM is running. A VM that was paused stays paused.
    pub running: bool,
    /// How long the guest was paused, in microseconds.
    pub pause_us: u64,
    /// The time from then until the guest's clock was right, in microseconds. It is absent if the VM
    /// is paused, or its guest has no agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_us: Option<u64>,
    /// The memory that was put back, in bytes.
    pub memory_bytes: u64,
    /// Notices: what the guest could not do, as sentences for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
}
