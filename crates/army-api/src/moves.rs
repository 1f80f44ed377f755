//! Moving VMs to other hosts while they run.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::vms::Vm;

/// A request to move a VM to another host. Its guest goes on there, after a pause of an instant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateVm {
    /// The host that the VM is moved to. By default, one is chosen as for a new VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 200)]
    pub to: Option<String>,
    /// The most bytes that are sent in a second while the guest runs, at least 65,536. By default, there
    /// is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 65536, maximum = 1099511627776_i64)]
    pub bytes_per_second: Option<u64>,
}

/// A VM that was moved to another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MovedVm {
    /// The VM, as it is now.
    pub vm: Vm,
    /// How it was moved.
    pub moved: Moved,
}

/// How a VM was moved. What was measured is 0 where the source host could not be asked any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// The host that had the VM.
    pub from: String,
    /// The host that the VM was moved to.
    pub to: String,
    /// The bytes that were sent.
    pub bytes: u64,
    /// The time for which the guest was paused, in microseconds.
    pub pause_us: u64,
    /// The time that sending the VM took, in microseconds.
    pub total_us: u64,
    /// How often memory was sent while the guest ran.
    pub rounds: u32,
}
