//! What a VM uses, and what its guest has written to its console.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::vms::VmMemory;

/// The most bytes of a console's output that one request returns.
pub const MAX_CONSOLE_BYTES: u32 = 256 << 10;

/// What a VM uses, as its host counts it since the VM's start. A fork begins at 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({
    "addresses": ["10.213.0.2"], "cpu_user_us": 1200000, "cpu_system_us": 300000,
    "disk_read_bytes": 1048576, "disk_written_bytes": 4096,
    "network_received_bytes": 700, "network_sent_bytes": 500,
    "memory": {
        "guest_bytes": 536870912, "private_bytes": 12582912, "shared_bytes": 104857600,
        "swapped_bytes": 0
    }
}))]
pub struct VmFigures {
    /// The addresses that the host has given the guest on the host's own network. A guest may have
    /// others.
    pub addresses: Vec<String>,
    /// The processor time of the guest and of its devices, in microseconds.
    pub cpu_user_us: u64,
    /// The processor time that the host's kernel took for them, in microseconds.
    pub cpu_system_us: u64,
    /// The bytes that were read from the host's disks for the VM. What was in the host's cache does
    /// not count.
    pub disk_read_bytes: u64,
    /// The bytes that were written to the host's disks for the VM.
    pub disk_written_bytes: u64,
    /// The bytes of the network packets that the guest has received.
    pub network_received_bytes: u64,
    /// The bytes of the network packets that the guest has sent.
    pub network_sent_bytes: u64,
    /// The memory usage of the VM.
    pub memory: VmMemory,
}

/// The part of a console's output to return.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ConsolePart {
    /// The number of bytes at the end of the output, 1 to 262,144. The default is 65,536.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(minimum = 1, maximum = 262144)]
    pub bytes: Option<u32>,
}
