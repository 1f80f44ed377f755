//! Requests about VMs.

use army_api::vms::{Balloon, IdlePolicy, NetworkPolicy};
use serde::{Deserialize, Serialize};

use super::TemplateFacts;
use crate::Result;

super::operations! {
    CreateVmsRequest = "create-vms" -> CreateVmsResponse;
    ForkVmRequest = "fork-vm" -> CreateVmsResponse;
    DestroyVmRequest = "destroy-vm" -> ();
    PauseVmRequest = "pause-vm" -> ();
    ResumeVmRequest = "resume-vm" -> ();
    SuspendVmRequest = "suspend-vm" -> ();
    BalloonRequest = "balloon" -> Balloon;
    SnapshotVmRequest = "snapshot-vm" -> TemplateFacts;
    ForgetVmsRequest = "forget-vms" -> ();
    UpdateVmRequest = "update-vm" -> ();
}

/// A VM that is to be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// The VM's id, which the controller has chosen.
    pub id: String,
    /// The incarnation of the VM. A node refuses an epoch that is not newer than the one that it
    /// knows.
    pub epoch: u64,
    /// The guest's host name.
    pub name: String,
    /// When the VM is destroyed, in milliseconds since 1970 by the controller's clock.
    #[serde(default)]
    pub expires_ms: Option<u64>,
    /// How long the VM may live, in milliseconds. The node measures it by a clock that nobody sets,
    /// and it takes precedence over `expires_ms`.
    #[serde(default)]
    pub ttl_ms: Option<u64>,
    /// What the node does when the VM is not used.
    #[serde(default)]
    pub idle: Option<IdlePolicy>,
    /// What the VM's network permits; `None` is the default policy.
    #[serde(default)]
    pub network: Option<NetworkPolicy>,
}

impl VmSpec {
    /// A VM without limits and policies.
    pub fn new(id: String, epoch: u64, name: String) -> Self {
        Self {
            id,
            epoch,
            name,
            expires_ms: None,
            ttl_ms: None,
            idle: None,
            network: None,
        }
    }
}

/// See [`NodeApi::create_vms`](crate::NodeApi::create_vms).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateVmsRequest {
    /// The name of the template in the host's store.
    pub template: String,
    /// The VMs. Their network policies are alike.
    pub vms: Vec<VmSpec>,
}

/// See [`NodeApi::fork_vm`](crate::NodeApi::fork_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ForkVmRequest {
    /// The id of the running VM that is forked.
    pub parent: String,
    /// The forks. Their network policies are alike.
    pub vms: Vec<VmSpec>,
}

/// What became of each VM of a request, in the request's order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateVmsResponse {
    /// One result for each VM.
    pub results: Vec<Result<CreatedVm>>,
}

/// A VM that was created and runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreatedVm {
    /// Whether the VM was a standby.
    pub warm: bool,
    /// The time from the request until the guest ran, in microseconds.
    pub running_us: u64,
    /// The time from then until the guest had its own identity, in microseconds.
    pub identity_us: u64,
    /// What the host or the guest could not do for the VM.
    #[serde(default)]
    pub notices: Vec<String>,
    /// The addresses that the host has given the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
}

/// See [`NodeApi::destroy_vm`](crate::NodeApi::destroy_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DestroyVmRequest {
    /// The VM's id.
    pub vm: String,
    /// Why the VM ends, for its record.
    pub reason: String,
}

/// See [`NodeApi::pause_vm`](crate::NodeApi::pause_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PauseVmRequest {
    /// The VM's id.
    pub vm: String,
}

/// See [`NodeApi::suspend_vm`](crate::NodeApi::suspend_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SuspendVmRequest {
    /// The VM's id.
    pub vm: String,
}

/// See [`NodeApi::resume_vm`](crate::NodeApi::resume_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ResumeVmRequest {
    /// The VM's id.
    pub vm: String,
}

/// See [`NodeApi::balloon`](crate::NodeApi::balloon).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BalloonRequest {
    /// The VM's id.
    pub vm: String,
    /// The size to ask the guest for, in bytes; `None` only reads the balloon.
    #[serde(default)]
    pub target_bytes: Option<u64>,
}

/// See [`NodeApi::snapshot_vm`](crate::NodeApi::snapshot_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotVmRequest {
    /// The VM's id.
    pub vm: String,
    /// The name of the new template.
    pub template: String,
    /// Whether the template contains only what differs from the VM's own template.
    pub diff: bool,
}

/// See [`NodeApi::connect_agent`](crate::NodeApi::connect_agent).
#[derive(Debug, Clone)]
pub struct ConnectAgentRequest {
    /// The VM's id.
    pub vm: String,
}

/// See [`NodeApi::forget_vms`](crate::NodeApi::forget_vms).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ForgetVmsRequest {
    /// The VMs' ids.
    pub vms: Vec<String>,
}

/// See [`NodeApi::update_vm`](crate::NodeApi::update_vm). What is `None` is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateVmRequest {
    /// The VM's id.
    pub vm: String,
    /// The number of the change, which grows with each change of the VM. A change that is not newer
    /// than the last one is answered with success and changes nothing.
    pub revision: u64,
    /// A new time to live.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime: Option<Lifetime>,
    /// A new idle policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<IdleChange>,
    /// A new network policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
}

/// The time to live of a VM from now on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetime {
    /// How long the VM may live from the arrival of the request on, in milliseconds; `None` is no
    /// limit.
    pub ttl_ms: Option<u64>,
    /// When that time is over, in milliseconds since 1970 by the controller's clock, for people.
    pub expires_ms: Option<u64>,
}

/// The idle policy of a VM from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleChange {
    /// The policy; `None` where nothing happens to a VM that is idle.
    pub policy: Option<IdlePolicy>,
}
