//! VMs that simulated nodes send to each other.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use army_api::vms::VmState;

use super::SimulatedNode;
use crate::requests::{
    DecideMoveRequest, ExpectVmRequest, MoveDecision, MoveStatus, Presence, SendVmRequest, SentVm,
    VmOffer,
};
use crate::{Error, ErrorKind, Result};

/// The memory that each VM has of its own, in bytes.
const PRIVATE_BYTES: u64 = 1 << 20;

/// The word at whose passing the connection of a move is lost, and with it what both hosts know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LostWord {
    /// The destination refuses the VM, or the connection fails before it has all of it.
    Refusal(Error),
    /// The destination has all of the VM, and the source does not hear it: it keeps the VM.
    Ready,
    /// The source gives the VM away, and the destination does not hear it.
    Go,
    /// The destination runs the VM, and the source does not hear it.
    Running,
    /// The source's process of the VM ends after it has given the VM away, before the destination hears
    /// it.
    Source,
    /// The destination's process of the VM ends after the source has given the VM away.
    Destination,
}

/// What a node knows of VMs that move.
#[derive(Default)]
pub(super) struct SimulatedMoves {
    /// How the next moves end, by the ids of their VMs.
    faults: HashMap<String, LostWord>,
    /// The epochs of VMs, which are 1 where they have not moved.
    epochs: HashMap<String, u64>,
    /// Where VMs are, where that is not just here.
    presence: HashMap<String, Presence>,
    /// What was requested of VMs that are sent, with their former states.
    departures: HashMap<String, (SendVmRequest, VmState)>,
    /// The tickets and the next states of VMs that are expected.
    expected: HashMap<String, (String, VmState)>,
    /// Why VMs did not move.
    reasons: HashMap<String, String>,
}

impl SimulatedMoves {
    pub(super) fn epoch(&self, id: &str) -> u64 {
        self.epochs.get(id).copied().unwrap_or(1)
    }

    /// A VM has ended.
    pub(super) fn ended(&mut self, id: &str) {
        self.presence.insert(id.to_owned(), Presence::Ended);
        self.departures.remove(id);
    }

    pub(super) fn forget(&mut self, id: &str) {
        self.presence.remove(id);
        self.departures.remove(id);
        self.expected.remove(id);
    }
}

impl SimulatedNode {
    /// Lets VMs be sent from this node to `peer`.
    pub fn connect(&self, peer: &Arc<SimulatedNode>) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.insert(peer.name.clone(), Arc::downgrade(peer));
    }

    /// Lets the next move of a VM from this host end like this.
    pub fn lose_in_move(&self, vm: &str, lost: LostWord) {
        self.state().moves.faults.insert(vm.to_owned(), lost);
    }

    /// The state that the host has a VM in.
    pub fn vm_state(&self, vm: &str) -> Option<VmState> {
        self.state().vms.get(vm).copied()
    }

    /// The epoch in which the host has a VM.
    pub fn vm_epoch(&self, vm: &str) -> u64 {
        self.state().moves.epoch(vm)
    }

    pub(super) fn offer(&self, vm: &str) -> Result<VmOffer> {
        let state = self.state();
        let is_here = state.vms.get(vm).is_some_and(|it| it.is_reported());
        if !is_here {
            let message = format!("the VM {vm} does not run");
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let has_checkpoints = state
            .checkpoints
            .get(vm)
            .is_some_and(|it| !it.checkpoints.is_empty());
        if has_checkpoints {
            let message = "the VM has checkpoints, which would be lost";
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let template = state.origins.get(vm).cloned().unwrap_or_default();
        let known = state.templates.get(&template);
        Ok(VmOffer {
            template_id: known.map(|it| it.facts.id.clone()).unwrap_or_default(),
            template,
            private_bytes: PRIVATE_BYTES,
            cpu: None,
            ceiling: None,
        })
    }

    pub(super) fn expect(&self, request: ExpectVmRequest) -> Result<()> {
        let mut state = self.state();
        let id = request.vm.id;
        if !state.templates.contains_key(&request.template) {
            let message = format!("template `{}` not found", request.template);
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let is_known = state.vms.get(&id).is_some_and(|it| it.is_alive());
        if is_known || request.vm.epoch <= state.moves.epochs.get(&id).copied().unwrap_or(0) {
            let message = format!("the VM {id} is known");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        state.vms.insert(id.clone(), VmState::Migrating);
        state.origins.insert(id.clone(), request.template);
        state.moves.epochs.insert(id.clone(), request.vm.epoch);
        state.moves.presence.insert(id.clone(), Presence::Absent);
        let expected = (request.ticket, request.then);
        state.moves.expected.insert(id, expected);
        Ok(())
    }

    pub(super) async fn depart(&self, request: SendVmRequest) -> Result<SentVm> {
        let id = request.vm.clone();
        {
            let mut state = self.state();
            let former = state.vms.get(&id).copied();
            let former = former.filter(|it| it.is_reported()).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("the VM {id} does not run"))
            })?;
            if request.epoch <= state.moves.epoch(&id) {
                let message = format!("the epoch {} is over", request.epoch);
                return Err(Error::new(ErrorKind::Conflict, message));
            }
            state.vms.insert(id.clone(), VmState::Migrating);
            state.moves.presence.insert(id.clone(), Presence::Sending);
            let departure = (request.clone(), former);
            state.moves.departures.insert(id.clone(), departure);
        }
        self.departures.pass().await;
        self.complete_departure(&id)
    }

    /// Completes the departure of a VM whose controller was killed: nodes go on without one.
    ///
    /// # Errors
    /// Why the VM was not sent.
    pub fn complete_departure(&self, id: &str) -> Result<SentVm> {
        let request = self.state().moves.departures.get(id).cloned();
        let id = id.to_owned();
        let Some((request, _)) = request else {
            return Err(failed("the VM is not being sent"));
        };
        let lost = self.state().moves.faults.remove(&id);
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = peers.get(&request.to).cloned();
        drop(peers);
        let peer = peer.and_then(|peer| peer.upgrade());
        let (presence, result) = match &peer {
            None => (
                Presence::Here,
                Err(failed("the other host does not answer")),
            ),
            Some(peer) => arrive(peer, &request, lost),
        };
        let mut state = self.state();
        // It may have been destroyed meanwhile.
        if state.vms.get(&id).is_some_and(|it| it.is_alive()) {
            state.moves.presence.insert(id.clone(), presence);
        }
        if let Err(error) = &result {
            state.moves.reasons.insert(id, error.message.clone());
        }
        result
    }

    pub(super) fn move_status(&self, id: &str) -> MoveStatus {
        let state = self.state();
        let presence = match (state.vms.get(id), state.moves.presence.get(id)) {
            (_, Some(presence)) => *presence,
            (Some(vm), None) if vm.is_alive() => Presence::Here,
            (Some(_), None) => Presence::Ended,
            (None, None) => Presence::Absent,
        };
        MoveStatus {
            presence,
            epoch: match state.vms.contains_key(id) {
                true => state.moves.epoch(id),
                false => 0,
            },
            departure: state.moves.departures.get(id).map(|it| it.0.epoch),
            reason: state.moves.reasons.get(id).cloned(),
            sent_bytes: None,
        }
    }

    pub(super) fn decide(&self, request: &DecideMoveRequest) -> Result<()> {
        let id = &request.vm;
        let presence = self.move_status(id).presence;
        let mut state = self.state();
        if !state.vms.contains_key(id) {
            return match request.decision {
                MoveDecision::Elsewhere => Ok(()),
                MoveDecision::Here => {
                    let message = format!("this host has no VM {id}");
                    Err(Error::new(ErrorKind::NotFound, message))
                }
            };
        }
        if request.epoch < state.moves.epoch(id) {
            return Err(failed("the epoch is over"));
        }
        match (request.decision, presence) {
            (_, Presence::Sending | Presence::Receiving) => Err(failed("it is being sent")),
            (MoveDecision::Here, Presence::Absent) => Err(failed("it has not arrived")),
            (MoveDecision::Here, Presence::Ended | Presence::Left) => {
                state.vms.insert(id.clone(), VmState::Ended);
                state.moves.forget(id);
                Ok(())
            }
            (MoveDecision::Here, _) => {
                let departure = state.moves.departures.remove(id);
                let expected = state.moves.expected.remove(id);
                let former = departure.map(|it| it.1).or(expected.map(|it| it.1));
                if let Some(former) = former {
                    state.vms.insert(id.clone(), former);
                }
                state.moves.presence.remove(id);
                state.moves.epochs.insert(id.clone(), request.epoch);
                Ok(())
            }
            (MoveDecision::Elsewhere, Presence::Here) => Err(failed("it runs here")),
            (MoveDecision::Elsewhere, _) => {
                state.vms.remove(id);
                state.moves.forget(id);
                Ok(())
            }
        }
    }
}

/// Lets a VM arrive at `peer`, as far as the connection lasts. Returns where it is for its source.
fn arrive(
    peer: &SimulatedNode,
    request: &SendVmRequest,
    lost: Option<LostWord>,
) -> (Presence, Result<SentVm>) {
    let mut there = peer.state();
    let id = &request.vm;
    let expected = there.moves.expected.get(id).cloned();
    let Some((_, then)) = expected.filter(|(ticket, _)| *ticket == request.ticket) else {
        let message = "the controller has not permitted this host to send the VM";
        let refused = Error::new(ErrorKind::PermissionDenied, message);
        return (Presence::Here, Err(refused));
    };
    let broken = || Err(failed("the connection was lost"));
    let mut arrives = |presence| {
        there.moves.presence.insert(id.clone(), presence);
    };
    match lost {
        Some(LostWord::Refusal(error)) => {
            there.vms.insert(id.clone(), VmState::Failed);
            (Presence::Here, Err(error))
        }
        Some(LostWord::Ready) => {
            arrives(Presence::Arrived);
            (Presence::Here, broken())
        }
        Some(LostWord::Go) => {
            arrives(Presence::Arrived);
            (Presence::Moved, broken())
        }
        Some(LostWord::Source) => {
            arrives(Presence::Arrived);
            (Presence::Left, broken())
        }
        Some(LostWord::Destination) => {
            there.vms.insert(id.clone(), VmState::Failed);
            (Presence::Moved, broken())
        }
        running => {
            there.vms.insert(id.clone(), then);
            there.moves.presence.remove(id);
            there.moves.expected.remove(id);
            match running {
                None => {
                    let sent = SentVm {
                        bytes: PRIVATE_BYTES,
                        pause_us: 1,
                        total_us: 2,
                        rounds: 1,
                    };
                    (Presence::Left, Ok(sent))
                }
                Some(_) => (Presence::Moved, broken()),
            }
        }
    }
}

fn failed(message: &str) -> Error {
    Error::new(ErrorKind::Conflict, message)
}
