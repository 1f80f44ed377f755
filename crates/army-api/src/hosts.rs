//! Hosts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How a host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostState {
    /// It answers, and takes VMs.
    Ready,
    /// It answers and takes no new VMs; those that it has go on.
    Draining,
    /// It answers, and says that something is wrong with it.
    Unhealthy,
    /// It does not answer. Its VMs may well run.
    Unreachable,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// How it is.
    pub state: HostState,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// When it was last heard of.
    pub seen_ms: u64,
    /// What it has.
    pub capacity: Capacity,
    /// The layers that the jail of its VMs lacks; none where the jail is complete.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing_jail_layers: Vec<MissingJailLayer>,
    /// VMs that run on it.
    pub vms: u32,
}

/// A layer that the jail of VMs lacks on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MissingJailLayer {
    /// The layer: `namespaces`, `user-id`, `cgroup` or `landlock`.
    pub layer: String,
    /// Why the host cannot provide it.
    pub reason: String,
}

/// A change to a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeHost {
    /// Labels that it gets, or, with null, loses; others stay.
    #[serde(default)]
    pub labels: BTreeMap<String, Option<String>>,
}

/// A request for a token that a host joins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateJoinToken {
    /// How long it can be used; 15 minutes where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1440)]
    pub minutes: Option<u32>,
}

/// What a host joins with: `army node --token`. It works once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// The token.
    pub token: String,
    /// When it ends, in milliseconds since 1970.
    pub expires_ms: u64,
}

/// What a host has, and what is left of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// Processors.
    pub cpus: u32,
    /// Runnable tasks in the last minute, in thousandths.
    pub load_milli: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Memory that could be had without swapping.
    pub available_bytes: u64,
    /// What its VMs' guests were promised in sum.
    pub promised_bytes: u64,
    /// What its VMs have that nobody else has: what they really cost.
    pub private_bytes: u64,
    /// Space for templates.
    pub disk_free_bytes: u64,
}
