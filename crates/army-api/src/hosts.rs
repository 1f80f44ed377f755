//! Hosts, their resources, and the tokens with which they join.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The state of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostState {
    /// The host responds, and new VMs are placed on it.
    Ready,
    /// The host responds, but no new VMs are placed on it. Its existing VMs continue to run.
    Draining,
    /// The host responds, but reports that something is wrong with it.
    Unhealthy,
    /// The host does not respond. Its VMs may still be running.
    Unreachable,
}

/// A host: a machine that runs VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// The unique name of the host.
    pub name: String,
    /// The state of the host.
    pub state: HostState,
    /// The reason that the host is unhealthy or unreachable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The labels of the host, which placement can select.
    pub labels: BTreeMap<String, String>,
    /// The time of the last report from the host, in milliseconds since 1970. Only administrators
    /// see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_ms: Option<u64>,
    /// The resources of the host and how much of them is in use. Only administrators see them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
    /// The layers that are missing from the jail of the VMs on this host. It is absent if the jail
    /// is complete. Only administrators see it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing_jail_layers: Vec<MissingJailLayer>,
    /// Notices: what an administrator should know about the host, as sentences. Only administrators
    /// see them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
    /// The number of VMs on the host that have not ended. Only administrators see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vms: Option<u32>,
}

impl Host {
    /// What users see of the host: its name, its labels, and whether it accepts VMs, by its state.
    #[must_use]
    pub fn for_users(self) -> Self {
        Self {
            name: self.name,
            state: self.state,
            labels: self.labels,
            reason: None,
            seen_ms: None,
            capacity: None,
            missing_jail_layers: Vec::new(),
            notices: Vec::new(),
            vms: None,
        }
    }
}

/// A layer that is missing from the jail of the VMs on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MissingJailLayer {
    /// The name of the layer: `namespaces`, `user-id`, `cgroup` or `landlock`.
    pub layer: String,
    /// The reason that the host cannot provide the layer.
    pub reason: String,
}

/// A request to change a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeHost {
    /// The labels to set, or, where the value is null, to remove. Labels that are not mentioned are
    /// kept. A host has at most 64 labels; keys have 1 to 63 characters, and values 1 to 255.
    #[serde(default)]
    #[schema(schema_with = crate::limits::label_changes)]
    pub labels: BTreeMap<String, Option<String>>,
}

/// A request for a token with which a host can join.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateJoinToken {
    /// The lifetime of the token, in minutes, 1 to 1,440. The default is 15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1440)]
    pub minutes: Option<u32>,
}

/// A token with which one host can join, once, by `army node --token`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// The secret token.
    pub token: String,
    /// The time at which the token expires, in milliseconds since 1970.
    pub expires_ms: u64,
}

/// The resources of a host and how much of them is in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// The number of CPUs of the host.
    pub cpus: u32,
    /// The load average of the last minute, in thousandths.
    pub load_milli: u32,
    /// The total memory of the host, in bytes.
    pub memory_bytes: u64,
    /// The memory that is available without swapping, in bytes.
    pub available_bytes: u64,
    /// The total memory size of the VMs on the host, in bytes. It may exceed the memory of the
    /// host, because clones share memory.
    pub promised_bytes: u64,
    /// The memory that the VMs on the host do not share with others, in bytes. Placement uses this
    /// figure as the actual cost of the VMs.
    pub private_bytes: u64,
    /// The free disk space for templates, in bytes.
    pub disk_free_bytes: u64,
    /// The free space of the runtime directory, in bytes. It is absent if the host does not report
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_free_bytes: Option<u64>,
}
