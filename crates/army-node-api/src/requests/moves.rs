//! Requests about VMs that move to another host.
//!
//! The controller has the source describe the VM ([`OfferVmRequest`]), the destination expect it
//! ([`ExpectVmRequest`]), and the source send it ([`SendVmRequest`]). The source connects to the
//! destination with a ticket that works once. From there on the two VM processes decide which of them
//! runs the guest. Where it is not known how that ended, the controller asks both nodes
//! ([`InspectMoveRequest`]) and tells both the same ([`DecideMoveRequest`]).
//!
//! The permission to run a VM is its epoch, which the controller chooses: the destination gets a greater
//! one for the move, and where the move fails, the source gets one that is greater still.

use std::net::SocketAddr;

use army_api::templates::CpuFeatures;
use army_api::vms::VmState;
use clone_api::config::Egress;
use serde::{Deserialize, Serialize};

use super::VmSpec;

super::operations! {
    OfferVmRequest = "offer-vm" -> VmOffer;
    ExpectVmRequest = "expect-vm" -> ();
    SendVmRequest = "send-vm" -> SentVm;
    InspectMoveRequest = "inspect-move" -> MoveStatus;
    DecideMoveRequest = "decide-move" -> ();
}

/// See [`NodeApi::offer_vm`](crate::NodeApi::offer_vm).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OfferVmRequest {
    /// The VM's id.
    pub vm: String,
}

/// What a host must have to take in a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmOffer {
    /// The name of the VM's template in the stores of hosts.
    pub template: String,
    /// The hash of the template's content.
    pub template_id: String,
    /// The memory that the VM has of its own, in bytes; for a suspended VM, the size of its state.
    pub private_bytes: u64,
    /// The CPU features that the guest was told of; `None` where the source does not know.
    #[serde(default)]
    pub cpu: Option<CpuFeatures>,
    /// The destinations that the guest may send to at the most, whatever its policy.
    #[serde(default)]
    pub ceiling: Option<Egress>,
}

/// See [`NodeApi::expect_vm`](crate::NodeApi::expect_vm).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectVmRequest {
    /// The VM, with the epoch in which it runs on this host.
    pub vm: VmSpec,
    /// The number of the VM's last change.
    pub revision: u64,
    /// The state that the VM gets when it has arrived: running, paused or suspended.
    pub then: VmState,
    /// The destinations that the guest may send to at the most, whatever its policy.
    #[serde(default)]
    pub ceiling: Option<Egress>,
    /// The hash of the content of the VM's template, which the host must have.
    pub template_id: String,
    /// The name of the template in the host's store.
    pub template: String,
    /// The host that sends the VM.
    pub from: String,
    /// The ticket that the source shows: at least 32 random characters.
    pub ticket: String,
    /// How long the ticket is valid, in seconds. An hour is the most.
    pub valid_s: u64,
}

/// See [`NodeApi::send_vm`](crate::NodeApi::send_vm).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendVmRequest {
    /// The VM's id.
    pub vm: String,
    /// The epoch of the VM on the destination.
    pub epoch: u64,
    /// The destination.
    pub to: String,
    /// The address where the destination's node listens.
    pub address: SocketAddr,
    /// The ticket that the controller has told the destination, too.
    pub ticket: String,
    /// The most bytes that are sent in a second while the guest runs; `None` where there is no limit.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
}

/// What was sent of a VM that runs on another host now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SentVm {
    /// The bytes that were sent.
    pub bytes: u64,
    /// The time for which the guest was paused, in microseconds.
    pub pause_us: u64,
    /// The time that all of it took, in microseconds.
    pub total_us: u64,
    /// How often memory was sent while the guest ran.
    pub rounds: u32,
}

/// See [`NodeApi::accept_vm`](crate::NodeApi::accept_vm).
#[derive(Debug, Clone)]
pub struct AcceptVmRequest {
    /// The VM's id.
    pub vm: String,
    /// The host that sends the VM, as its certificate says.
    pub from: String,
}

/// See [`NodeApi::inspect_move`](crate::NodeApi::inspect_move).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InspectMoveRequest {
    /// The VM's id.
    pub vm: String,
}

/// What a node knows of a VM that is moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveStatus {
    /// Where the VM is, as far as the host can tell.
    pub presence: Presence,
    /// The VM's epoch on the host; 0 where the host does not know the VM.
    pub epoch: u64,
    /// The epoch of the move that the host has begun to send the VM for.
    #[serde(default)]
    pub departure: Option<u64>,
    /// Why the last transfer has failed, or why the VM has ended.
    #[serde(default)]
    pub reason: Option<String>,
    /// How many bytes were sent, while the VM is sent.
    #[serde(default)]
    pub sent_bytes: Option<u64>,
}

/// Where a VM that is moved is, as one of the two hosts sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    /// There is nothing of the VM on the host that could run.
    Absent,
    /// The VM is the host's: it runs there, or is paused or suspended.
    Here,
    /// The VM is being sent, and runs here unless the other host runs it by now.
    Sending,
    /// The VM was given to the other host, which has not answered. It waits here for a decision.
    Moved,
    /// The VM's process has ended while it was sent: the other host has the VM, or nobody has.
    Left,
    /// The VM is expected, or being received.
    Receiving,
    /// All of the VM has arrived, and the other host has not said that it may run. It waits for a
    /// decision.
    Arrived,
    /// The VM has ended on the host.
    Ended,
    /// Something that a newer node says.
    #[serde(other)]
    Unknown,
}

/// See [`NodeApi::decide_move`](crate::NodeApi::decide_move).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecideMoveRequest {
    /// The VM's id.
    pub vm: String,
    /// For a VM that the host has from now on, the epoch in which it runs there. For one that is on the
    /// other host, the epoch in which it runs there.
    pub epoch: u64,
    /// What is the case.
    pub decision: MoveDecision,
}

/// Which of two hosts has a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveDecision {
    /// The host that is asked has the VM, and runs it.
    Here,
    /// Another host has the VM. The host that is asked forgets it.
    Elsewhere,
}
