//! Moving VMs to other hosts while they run.
//!
//! A move is an operation. Its beginning records where the VM is being moved to, and the epoch in which it
//! runs there. The two nodes carry the move out, even without a controller. Whoever carries on with the
//! operation asks both what has become of it (`settle`), tells the destination, records the end, and
//! tells the source. What is not told in time is found by reports and told then (`reconcile`).

mod permits;
mod settle;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use army_api::moves::{MigrateVm, Moved, MovedVm};
use army_api::operations::OperationKind;
use army_api::templates::Template;
use army_api::vms::{Vm, VmState};
use army_node_api::requests::{
    DecideMoveRequest, ExpectVmRequest, MoveDecision, OfferVmRequest, SendVmRequest, SentVm,
    VmOffer, VmSpec,
};
use army_node_api::time::now_ms;
use serde::{Deserialize, Serialize};

use crate::admission::{AdmittedRequest, Queue, WAIT};
use crate::operations::{Outcome, Output, Requester, StartedOperation, detached, internal};
use crate::scheduler::{HostView, Need};
use crate::store::moves::{MoveEnd, MoveRow, NewMove};
use crate::store::operations::{End, OperationRow};
use crate::store::reservations::Reservation;
use crate::{Controller, Error, ErrorKind, Result, deadlines, random};

pub(crate) use permits::MovePermits;
use settle::Settled;

/// How long a source may begin to send a VM, in seconds.
const TICKET_VALID_S: u64 = 300;
/// The least bytes a second that a VM may be sent with.
const MIN_BYTES_PER_SECOND: u64 = 64 << 10;

/// What is kept of a request to move a VM, for whoever resumes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MoveRecord {
    /// The host that has the VM.
    pub(crate) from: String,
    /// The state that the VM had.
    pub(crate) former: VmState,
    /// The host that was requested; `None` where any is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) to: Option<String>,
    /// The most bytes that are sent in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bytes_per_second: Option<u64>,
}

/// One attempt to move a VM.
#[derive(Debug, Clone)]
struct Attempt {
    vm: String,
    from: String,
    to: String,
    epoch: u64,
}

impl Controller {
    /// Begins to move a VM to another host.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the VM cannot be moved, with the reason, and the errors of the
    /// scheduler where no other host can take it. The VM then goes on where it is.
    pub async fn migrate_vm(
        self: &Arc<Self>,
        requester: &Requester,
        vm: &Vm,
        request: &MigrateVm,
    ) -> Result<StartedOperation> {
        self.cluster()?;
        let too_slow = |limit: &u64| *limit < MIN_BYTES_PER_SECOND;
        if request.bytes_per_second.as_ref().is_some_and(too_slow) {
            let message = format!("`bytes_per_second` must be at least {MIN_BYTES_PER_SECOND}");
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        let record = MoveRecord {
            from: vm.host.clone(),
            former: vm.state,
            to: request.to.clone(),
            bytes_per_second: request.bytes_per_second,
        };
        let content = (&vm.id, request);
        let kind = OperationKind::MigrateVm;
        let new = self.new_request(requester, kind, &vm.id, &content, &record)?;
        if let Some(known) = self.repeated(&new).await? {
            return Ok(known);
        }
        check_movable(vm, request.to.as_deref())?;
        if let Some(host) = &request.to {
            // A host that there is not is not found, rather than full.
            self.host(host).await?;
        }
        let (controller, vm) = (Arc::clone(self), vm.clone());
        detached(async move {
            let nobody = BTreeMap::new();
            let (to, admitted) = controller.place_move(&vm.id, &record, &nobody).await?;
            let departure = NewMove {
                vm: &vm.id,
                from: &record.from,
                to: &to,
                state: record.former,
            };
            let reservation = Reservation {
                departure: Some(departure),
                ..Reservation::default()
            };
            if let Some(known) = controller.begin(&new, reservation).await? {
                return Ok(known);
            }
            let (id, work) = (new.id().to_owned(), Arc::clone(&controller));
            let operation = id.clone();
            Ok(controller.carry_out(id, async move {
                work.carry_out_move(&operation, &vm.id, &record, Some(admitted))
                    .await
            }))
        })
        .await
    }

    /// Continues with a move that another task has begun.
    pub(crate) async fn resume_move(&self, row: &OperationRow) -> Outcome {
        let record: MoveRecord = serde_json::from_str(&row.request).map_err(internal)?;
        let known = self.store.move_of(&row.subject).await;
        let begun = match known {
            Ok(MoveRow {
                destination: Some(to),
                epoch,
                ..
            }) => Attempt {
                vm: row.subject.clone(),
                from: record.from.clone(),
                to,
                epoch,
            },
            // The VM has ended, and its record with it.
            Ok(_) | Err(_) => {
                let error = Error::new(ErrorKind::Conflict, "the VM ended while it was moved");
                let end = End::Failed(error.clone());
                self.store.end_operation(&row.id, &end).await?;
                return Err(error);
            }
        };
        // The nodes may have gone on. Where they have not, the move begins again.
        let interrupted = Err(Error::new(
            ErrorKind::Internal,
            "the server that moved the VM has ended",
        ));
        match self.settle(&row.id, &begun, interrupted).await? {
            Settled::Stayed(_) => {
                self.keep_at_source(&begun).await;
                let redirected = self.store.redirect_move(&begun.vm, &begun.to).await?;
                match redirected {
                    true => self.carry_out_move(&row.id, &begun.vm, &record, None).await,
                    false => {
                        let over = Settled::Over;
                        self.end_move(&row.id, &begun, &record, over).await
                    }
                }
            }
            settled => self.end_move(&row.id, &begun, &record, settled).await,
        }
    }

    /// Moves a VM whose destination is recorded. Where a host turns out to be unable to take it, another
    /// one is chosen.
    async fn carry_out_move(
        &self,
        operation: &str,
        vm: &str,
        record: &MoveRecord,
        mut admitted: Option<AdmittedRequest>,
    ) -> Outcome {
        let mut unable = BTreeMap::new();
        loop {
            let row = self.store.move_of(vm).await?;
            let attempt = Attempt {
                vm: vm.to_owned(),
                from: row.host.clone(),
                to: row.destination.clone().unwrap_or_default(),
                epoch: row.epoch,
            };
            let sent = match row.wanted {
                true => self.send(operation, &attempt, record, &row).await,
                false => Err(Error::new(ErrorKind::Conflict, "the VM was destroyed")),
            };
            let settled = self.settle(operation, &attempt, sent).await?;
            if let Settled::Stayed(error) = &settled
                && record.to.is_none()
                && matches!(error.kind, ErrorKind::HostUnsupported | ErrorKind::Busy)
            {
                unable.insert(attempt.to.clone(), error.clone());
                drop(admitted.take());
                // A host describes only VMs that it knows to be its own.
                self.keep_at_source(&attempt).await;
                if let Ok((to, place)) = self.place_move(vm, record, &unable).await
                    && self.store.redirect_move(vm, &to).await?
                {
                    admitted = Some(place);
                    continue;
                }
            }
            return self.end_move(operation, &attempt, record, settled).await;
        }
    }

    /// Chooses a host for a VM that is to be moved, and reserves the VM's memory there.
    async fn place_move(
        &self,
        vm: &str,
        record: &MoveRecord,
        unable: &BTreeMap<String, Error>,
    ) -> Result<(String, AdmittedRequest)> {
        let (offer, template) = self.offer(vm, &record.from).await?;
        let labels = self.store.move_of(vm).await?.host_labels;
        let need = Need {
            cost_bytes: offer.private_bytes,
            nominal_bytes: template.memory_bytes,
            template_bytes: template.data_bytes,
            anywhere: true,
        };
        // It counts for itself, and not as what a clone of its template costs.
        let queue = Queue {
            template: format!("moved:{vm}"),
            labels: labels.clone(),
        };
        let admitted = tokio::sync::Mutex::new(self.admission.admit()?);
        let attempt = || async {
            let mut views = self.host_views(&template, &labels).await?;
            views.retain(|view| may_take(view, record));
            for view in &mut views {
                if let Some(error) = unable.get(&view.name) {
                    view.lacks = vec![format!("what it takes: {}", error.message)];
                }
            }
            let mut admitted = admitted.lock().await;
            Ok(admitted.place(views, &format!("moved:{vm}"), need, 1))
        };
        let placed = self.admission.place_in_turn(queue, WAIT, attempt).await?;
        let to = placed.into_iter().next().ok_or_else(|| {
            let message = "no host was chosen for the VM";
            Error::new(ErrorKind::Internal, message)
        })?;
        Ok((to, admitted.into_inner()))
    }

    /// What a host must have for a VM, and the VM's template.
    async fn offer(&self, vm: &str, from: &str) -> Result<(VmOffer, Template)> {
        let request = OfferVmRequest { vm: vm.to_owned() };
        let node = self.node(from)?;
        let offer = node.offer_vm(request, deadlines::operation()).await?;
        let template = self.store.template(&offer.template).await;
        let mut template = template.map_err(|error| {
            let message = format!("the VM's template is not known: {}", error.message);
            Error::new(ErrorKind::Conflict, message)
        })?;
        if template.id != offer.template_id {
            let message = "the VM was forked from another template than the one of this name";
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        // The guest was told of these, whatever its template says.
        template.cpu = offer.cpu.clone().or(template.cpu);
        Ok((offer, template))
    }

    /// Has the destination expect a VM, and the source send it.
    async fn send(
        &self,
        operation: &str,
        attempt: &Attempt,
        record: &MoveRecord,
        row: &MoveRow,
    ) -> Result<SentVm> {
        let progress = format!("waits for its turn to leave {}", attempt.from);
        self.store.set_progress(operation, &progress).await?;
        let _permits = self.move_permits.take(&attempt.from, &attempt.to).await;
        let (source, destination) = (self.node(&attempt.from)?, self.node(&attempt.to)?);
        let address = destination.address().ok_or_else(|| {
            let message = format!("the host {} cannot be reached by others", attempt.to);
            Error::new(ErrorKind::HostUnsupported, message)
        })?;
        let (offer, template) = self.offer(&attempt.vm, &attempt.from).await?;
        let progress = format!("brings the template to {}", attempt.to);
        self.store.set_progress(operation, &progress).await?;
        self.ensure_template(&destination, &template).await?;
        let vm = self.store.vm(&attempt.vm).await?;
        let ticket = random::hex::<32>()?;
        let expect = ExpectVmRequest {
            vm: VmSpec {
                expires_ms: vm.expires_ms,
                ttl_ms: vm.expires_ms.map(|end| end.saturating_sub(now_ms())),
                idle: vm.idle,
                network: vm.network.clone(),
                ..VmSpec::new(vm.id.clone(), attempt.epoch, vm.name.clone())
            },
            revision: row.revision,
            then: record.former,
            ceiling: offer.ceiling,
            template: offer.template,
            template_id: offer.template_id,
            from: attempt.from.clone(),
            ticket: ticket.clone(),
            valid_s: TICKET_VALID_S,
        };
        let limit = deadlines::operation();
        destination.expect_vm(expect, limit).await?;
        let progress = format!("is sent from {} to {}", attempt.from, attempt.to);
        self.store.set_progress(operation, &progress).await?;
        let request = SendVmRequest {
            vm: vm.id,
            epoch: attempt.epoch,
            to: attempt.to.clone(),
            address,
            ticket,
            bytes_per_second: record.bytes_per_second,
        };
        Ok(source.send_vm(request, deadlines::transfer()).await?)
    }

    /// Records how a move has ended, and tells the source.
    async fn end_move(
        &self,
        operation: &str,
        attempt: &Attempt,
        record: &MoveRecord,
        settled: Settled,
    ) -> Outcome {
        let (end, operation_end) = match &settled {
            Settled::Moved(sent) => {
                let moved = moved(attempt, *sent);
                let result = serde_json::to_string(&moved).map_err(internal)?;
                (MoveEnd::Moved, End::Succeeded(result))
            }
            Settled::Stayed(error) => {
                let end = End::Failed(error.clone());
                (MoveEnd::Stayed(&error.message), end)
            }
            Settled::Over => {
                let message = "the VM ended while it was moved";
                let error = Error::new(ErrorKind::Conflict, message);
                (MoveEnd::Stayed(message), End::Failed(error))
            }
        };
        let state = match &settled {
            Settled::Over => VmState::Running,
            _ => record.former,
        };
        let move_id = (attempt.to.as_str(), attempt.epoch);
        let ended = (operation, &operation_end);
        self.store
            .end_move(&attempt.vm, move_id, end, state, ended)
            .await?;
        match settled {
            Settled::Moved(sent) => {
                let decision = MoveDecision::Elsewhere;
                self.tell_later(&attempt.from, &attempt.vm, attempt.epoch, decision)
                    .await;
                let vm = self.store.vm(&attempt.vm).await?;
                let moved = moved(attempt, sent);
                Ok(Output::Moved(Box::new(MovedVm { vm, moved })))
            }
            Settled::Stayed(error) => {
                self.keep_at_source(attempt).await;
                Err(error)
            }
            Settled::Over => {
                self.keep_at_source(attempt).await;
                Err(match operation_end {
                    End::Failed(error) | End::Unknown(error) => error,
                    End::Succeeded(_) => Error::new(ErrorKind::Internal, "the VM ended"),
                })
            }
        }
    }

    /// Tells the source of a move that the VM is its own, in the epoch after that of the move.
    async fn keep_at_source(&self, attempt: &Attempt) {
        let epoch = attempt.epoch.saturating_add(1);
        self.tell_later(&attempt.from, &attempt.vm, epoch, MoveDecision::Here)
            .await;
    }

    /// Tells a host what was decided. Where it does not answer, its reports show that it does not know,
    /// and it is told then.
    async fn tell_later(&self, host: &str, vm: &str, epoch: u64, decision: MoveDecision) {
        if let Err(error) = self.tell(host, vm, epoch, decision).await {
            tracing::warn!(host, vm, %error, "a host was not told where a VM is");
        }
    }

    /// Tells a host where a VM is.
    pub(crate) async fn tell(
        &self,
        host: &str,
        vm: &str,
        epoch: u64,
        decision: MoveDecision,
    ) -> Result<()> {
        let request = DecideMoveRequest {
            vm: vm.to_owned(),
            epoch,
            decision,
        };
        let node = self.node(host)?;
        Ok(node.decide_move(request, deadlines::decision()).await?)
    }

    /// What a move that has succeeded has made, as it is now.
    pub(crate) async fn recorded_move(&self, row: &OperationRow) -> Outcome {
        let result = row.result.as_deref().unwrap_or("{}");
        let moved: Moved = serde_json::from_str(result).map_err(internal)?;
        let vm = self.store.vm(&row.subject).await?;
        Ok(Output::Moved(Box::new(MovedVm { vm, moved })))
    }
}

fn moved(attempt: &Attempt, sent: SentVm) -> Moved {
    Moved {
        from: attempt.from.clone(),
        to: attempt.to.clone(),
        bytes: sent.bytes,
        pause_us: sent.pause_us,
        total_us: sent.total_us,
        rounds: sent.rounds,
    }
}

/// Whether a host may be chosen for a VM, as far as the request says.
fn may_take(view: &HostView, record: &MoveRecord) -> bool {
    view.name != record.from && record.to.as_ref().is_none_or(|to| *to == view.name)
}

/// Checks that a VM is in a state in which it can be moved, and not where it should go already.
fn check_movable(vm: &Vm, to: Option<&str>) -> Result<()> {
    let name = &vm.name;
    let refuse = |message: String| Err(Error::new(ErrorKind::Conflict, message));
    match vm.state {
        _ if to == Some(vm.host.as_str()) => {
            refuse(format!("the VM {name} is on {} already", vm.host))
        }
        VmState::Running | VmState::Paused | VmState::Suspended => Ok(()),
        VmState::Creating => refuse(format!("the VM {name} is being created")),
        VmState::Migrating => refuse(format!("the VM {name} is being moved already")),
        VmState::Unreachable => {
            let message = format!(
                "the host {} of the VM {name} does not answer, and only that host has the VM",
                vm.host
            );
            Err(Error::new(ErrorKind::HostUnavailable, message)
                .advise("bring the host back, or remove it: its VMs count as lost then")
                .retry_after(crate::error::RETRY_S))
        }
        VmState::Ended | VmState::Failed => {
            let reason = vm.reason.as_deref().unwrap_or("the reason is unknown");
            refuse(format!("the VM {name} has ended: {reason}"))
        }
    }
}
