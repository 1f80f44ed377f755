//! VMs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Problem;

/// A request for VMs, all alike.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVms {
    /// The template that they are forked from, or a tag that points to it.
    pub template: String,
    /// How many, 1 to 1,000.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1000, default = 1)]
    pub count: u32,
    /// The name, which is the guest's host name too; several are called NAME-1, NAME-2 and so on.
    /// Without one it is made from the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Labels to find them by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// They go to hosts that have these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub host_labels: BTreeMap<String, String>,
    /// Added to the environment of every command that is run in them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// They are destroyed after so many seconds, whatever they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub ttl_s: Option<u64>,
    /// What is done to one that nobody uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<IdlePolicy>,
    /// What their network lets them do; as their template's VM where nothing is given, which is
    /// everything unless that was held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
}

/// What a VM's network lets it do. Its host sees to it; forks of the VM are held to the same.
/// Commands, files and ports go another way, and are not held.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkPolicy {
    /// Whom the guest may send to.
    pub egress: Egress,
}

/// Whom a guest may send to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Everybody.
    Full,
    /// Nobody.
    None,
    /// IPv4 addresses in these networks, up to 64 as in `10.0.0.0/8` or `192.0.2.7`, and nobody else:
    /// names are looked up only where a name server is among them.
    Allow(Vec<String>),
}

fn one() -> u32 {
    1
}

/// What is done to a VM in which no command was run for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct IdlePolicy {
    /// After so many seconds without a command.
    #[schema(minimum = 1)]
    pub after_s: u64,
    /// What is done.
    pub action: IdleAction,
}

/// See [`IdlePolicy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum IdleAction {
    /// Its CPUs are stopped; the next command sets them going again.
    Pause,
    /// It is destroyed.
    Destroy,
}

/// What a VM does, as last heard of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// A host was chosen and told.
    Creating,
    /// Its guest runs.
    Running,
    /// Its CPUs are stopped.
    Paused,
    /// It is over: destroyed, out of time, or ended by its guest; `reason` says which.
    Ended,
    /// It never ran, or its process died; `reason` says why.
    Failed,
    /// Its host does not answer; it may well run.
    Unreachable,
}

impl VmState {
    /// Whether it holds a place on its host.
    pub fn is_alive(self) -> bool {
        !matches!(self, Self::Ended | Self::Failed)
    }
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its id, never given twice.
    pub id: String,
    /// Its name; one that is over leaves its name to others.
    pub name: String,
    /// Whose it is.
    pub tenant: String,
    /// What it was forked from: a template's name, or `vm:` and the id of a VM.
    pub template: String,
    /// Where it runs.
    pub host: String,
    /// What it does.
    pub state: VmState,
    /// Why it is over, or failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// When it was asked for.
    pub created_ms: u64,
    /// When it is destroyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// What its network was told to let it do, where something was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
    /// How its creation went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fork: Option<ForkTimes>,
    /// What its host or its guest could not do when it was made, in words for people. It runs all
    /// the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
    /// Its memory, as last measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<VmMemory>,
}

/// How long a fork took, in microseconds, by who had it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkTimes {
    /// Whether it was taken from the standbys.
    pub warm: bool,
    /// From the request's arrival to the host being told: checks, placement, the store.
    pub placement_us: u64,
    /// From then to the guest running.
    pub running_us: u64,
    /// From then until it had its own identity.
    pub identity_us: u64,
    /// From the request's arrival to the VM being reported.
    pub total_us: u64,
}

/// A VM's memory on its host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmMemory {
    /// What the guest was promised.
    pub guest_bytes: u64,
    /// What only this VM has: what would come free with it.
    pub private_bytes: u64,
    /// What it shares with others of its template, and is mapped.
    pub shared_bytes: u64,
    /// What is in swap.
    pub swapped_bytes: u64,
}

/// The outcome for each VM that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedVms {
    /// In the order of their numbers.
    pub vms: Vec<Vm>,
    /// Those that failed, each by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
}

/// A VM that could not be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// The name that it would have had.
    pub name: String,
    /// Why.
    pub problem: Problem,
}

/// A request for forks of a running VM, which goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkVm {
    /// How many, 1 to 1,000.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1000, default = 1)]
    pub count: u32,
    /// As for [`CreateVms`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A request for a template of a running VM, which goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotVm {
    /// The template's name.
    pub template: String,
    /// Keep only what changed since the VM's template.
    #[serde(default)]
    pub diff: bool,
}

/// The size wanted of a VM's balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetBalloon {
    /// How much of the guest's memory the balloon should hold.
    pub bytes: u64,
}

/// A VM's balloon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Balloon {
    /// How much it should hold.
    pub target_bytes: u64,
    /// How much it holds.
    pub actual_bytes: u64,
    /// What the guest says could be had without swapping, where it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
}

/// Which VMs are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct VmFilter {
    /// Those of this template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Those on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Those with this label, `key=value`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Those that are over, too.
    #[serde(default)]
    pub all: bool,
    /// At most so many, 1 to 10,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(minimum = 1, maximum = 10000)]
    pub limit: Option<u32>,
    /// Those after the page that ended with this (`next`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// A page of VMs, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmPage {
    /// The VMs.
    pub vms: Vec<Vm>,
    /// What the next page begins `after`; none on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}
