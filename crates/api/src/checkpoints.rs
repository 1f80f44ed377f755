//! The requests and answers about checkpoints: states of a running VM that it can be set back to.

use serde::{Deserialize, Serialize};

pub use crate::checkpoint_name::CheckpointName;
use crate::control::SnapshotTimes;

/// The most checkpoints that a VM may have at once.
pub const MAX_CHECKPOINTS: usize = 32;

/// A checkpoint to be taken.
///
/// With the request come open files (`SCM_RIGHTS`), each empty and open for reading and writing:
/// one for the changed memory, and for each disk that the guest writes to two: one for the layer
/// that takes its writes from now on, and one for merging older layers. Files that are not needed
/// are closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NewCheckpoint {
    /// The checkpoint's name.
    pub name: CheckpointName,
    /// Whether the guest has an agent, which can set its clock after a rewind.
    #[serde(default)]
    pub has_agent: bool,
}

/// A checkpoint to be removed, or to be rewound to.
///
/// With the request to rewind comes an open file (`SCM_RIGHTS`) for each disk that the guest writes
/// to, empty and open for reading and writing: the layer that takes its writes from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// The checkpoint's name.
    pub name: CheckpointName,
}

/// A checkpoint that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CheckpointTaken {
    /// The checkpoint.
    pub checkpoint: CheckpointInfo,
    /// How long each stage took.
    pub times: SnapshotTimes,
}

/// A checkpoint of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CheckpointInfo {
    /// Its name.
    pub name: CheckpointName,
    /// The checkpoint that the VM had last taken or was rewound to when this one was taken, or the
    /// one before that where that was removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<CheckpointName>,
    /// When it was taken, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The memory that it holds besides what it shares with others when it is taken, in bytes.
    pub memory_bytes: u64,
    /// What it froze of the disks, in bytes.
    pub disk_bytes: u64,
}

/// The checkpoints of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CheckpointList {
    /// The checkpoints, the oldest first.
    pub checkpoints: Vec<CheckpointInfo>,
    /// The checkpoint that the VM has last taken or was rewound to; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub present: Option<CheckpointName>,
    /// The room on the host's disk that all of them take together, in bytes.
    pub used_bytes: u64,
}

/// What a rewind did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Rewound {
    /// The checkpoint that the VM is at.
    pub checkpoint: CheckpointName,
    /// Whether the guest runs; one that was paused before stays paused.
    pub running: bool,
    /// Whether the guest had an agent when the checkpoint was taken.
    pub has_agent: bool,
    /// Memory that shows the template's content again, or zeros, in bytes.
    pub dropped_bytes: u64,
    /// Memory that was read from the checkpoint's layers, in bytes.
    pub read_bytes: u64,
    /// How long each stage took.
    pub times: RewindTimes,
}

/// How long the stages of a rewind took, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RewindTimes {
    /// The pause of the guest, whole.
    pub pause_us: u64,
    /// Of the pause: stopping vCPUs and devices.
    pub stop_us: u64,
    /// Of the pause: finding out which pages can differ.
    pub find_us: u64,
    /// Of the pause: putting memory back.
    pub memory_us: u64,
    /// Of the pause: setting the disks back.
    pub disks_us: u64,
    /// Of the pause: restoring the machine's state.
    pub restore_us: u64,
}
