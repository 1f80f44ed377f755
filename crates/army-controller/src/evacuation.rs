//! Evacuating hosts: a host is drained, and all of its VMs are moved to others, a few at a time.
//!
//! Each VM is moved by an operation of its own. The evacuation itself remembers nothing: whoever resumes
//! it looks at which VMs are still there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use army_api::hosts::HostState;
use army_api::moves::MigrateVm;
use army_api::operations::OperationKind;
use army_api::vms::{Vm, VmFilter, VmState};
use futures_util::StreamExt;

use crate::operations::{Outcome, Output, Requester, StartedOperation, detached};
use crate::store::operations::{End, OperationRow};
use crate::store::reservations::Reservation;
use crate::{Controller, Error, ErrorKind, Result};

/// The number of VMs whose moves are begun at a time. Fewer are sent at a time.
const AT_ONCE: usize = 4;
/// How often a VM is tried.
const ATTEMPTS: u32 = 2;
/// The pause before the host's VMs are looked at again.
const LOOK: Duration = Duration::from_millis(500);
/// The most VMs that an error names.
const NAMED: usize = 5;

/// What an evacuation has come to.
#[derive(Default)]
struct Progress {
    moved: usize,
    /// The VMs that could not be moved, by their ids, with their names.
    failures: BTreeMap<String, (String, u32, Error)>,
}

impl Controller {
    /// Begins to drain a host and to move all of its VMs to others. An evacuation of the host that is in
    /// progress is returned as it is.
    pub async fn evacuate_host(
        self: &Arc<Self>,
        requester: &Requester,
        name: &str,
    ) -> Result<StartedOperation> {
        self.cluster()?;
        self.host(name).await?;
        let kind = OperationKind::EvacuateHost;
        if let Some(row) = self.store.running_operation(kind, name).await? {
            return Ok(self.started(&row.id));
        }
        let new = self.new_request(requester, kind, name, &name, &())?;
        let (controller, name) = (Arc::clone(self), name.to_owned());
        detached(async move {
            if let Some(known) = controller.begin(&new, Reservation::default()).await? {
                return Ok(known);
            }
            let (id, work) = (new.id().to_owned(), Arc::clone(&controller));
            let operation = id.clone();
            Ok(controller.carry_out(id, async move { work.evacuate(&operation, &name).await }))
        })
        .await
    }

    /// Moves all VMs from a host, and records the end of the operation that does so.
    pub(crate) async fn evacuate(self: &Arc<Self>, operation: &str, host: &str) -> Outcome {
        let row = self.store.operation(operation, None).await?;
        let outcome = self.move_all(&row, host).await;
        if let Err(error) = &outcome
            && error.kind == ErrorKind::Superseded
        {
            // The term of this controller has ended, and another one goes on.
            return outcome;
        }
        let end = End::of(&outcome);
        self.store.end_operation(operation, &end).await?;
        outcome
    }

    async fn move_all(self: &Arc<Self>, row: &OperationRow, host: &str) -> Outcome {
        self.store.set_draining(host, true).await?;
        let mut progress = Progress::default();
        loop {
            self.check_evacuates(host).await?;
            let vms = self.vms_to_move(host).await?;
            let is_given_up = |vm: &Vm| {
                let failed = progress.failures.get(&vm.id);
                failed.is_some_and(|(_, attempts, _)| *attempts >= ATTEMPTS)
            };
            let (kept, left): (Vec<_>, Vec<_>) = vms.into_iter().partition(is_given_up);
            progress
                .failures
                .retain(|id, _| kept.iter().chain(&left).any(|vm| vm.id == *id));
            if left.is_empty() {
                return match progress.failures.is_empty() {
                    true => Ok(Output::Host(Box::new(self.host(host).await?))),
                    false => Err(progress.failed(host)),
                };
            }
            let total = progress.moved + kept.len() + left.len();
            let ready = left.into_iter().filter(|vm| vm.state != VmState::Creating);
            let moves = ready.map(|vm| async {
                let moved = self.move_one(row, &vm).await;
                (vm, moved)
            });
            let mut moves = futures_util::stream::iter(moves).buffer_unordered(AT_ONCE);
            let mut has_moved = false;
            while let Some((vm, moved)) = moves.next().await {
                match moved {
                    Ok(()) => {
                        has_moved = true;
                        progress.moved += 1;
                        progress.failures.remove(&vm.id);
                    }
                    Err(error) => progress.note_failure(vm, error),
                }
                let text = progress.text(total);
                self.store.set_progress(&row.id, &text).await?;
            }
            if !has_moved {
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    /// Checks that an evacuation is to go on.
    async fn check_evacuates(&self, host: &str) -> Result<()> {
        match self.host(host).await?.state {
            HostState::Draining => Ok(()),
            HostState::Ready | HostState::Unhealthy => {
                let message = format!("{host} was undrained while it was evacuated");
                Err(Error::new(ErrorKind::Conflict, message))
            }
            HostState::Unreachable => {
                let message = format!(
                    "{host} does not answer, and only it has its VMs: they cannot be moved"
                );
                Err(Error::new(ErrorKind::HostUnavailable, message)
                    .advise("evacuate it again when it is back"))
            }
        }
    }

    /// The VMs of a host that have not ended.
    async fn vms_to_move(&self, host: &str) -> Result<Vec<Vm>> {
        let mut filter = VmFilter {
            host: Some(host.to_owned()),
            ..VmFilter::default()
        };
        let mut vms = Vec::new();
        loop {
            let page = self.store.vms(&filter, None).await?;
            vms.extend(page.vms);
            filter.after = page.next;
            if filter.after.is_none() {
                return Ok(vms);
            }
        }
    }

    /// Moves a VM, or waits for a move that is in progress.
    async fn move_one(self: &Arc<Self>, row: &OperationRow, vm: &Vm) -> Result<()> {
        let kind = OperationKind::MigrateVm;
        let started = match self.store.running_operation(kind, &vm.id).await? {
            Some(running) => self.started(&running.id),
            None => {
                let requester = Requester {
                    tenant: row.tenant.clone(),
                    is_administrator: true,
                    key: row.actor.clone(),
                    idempotency_key: None,
                };
                let request = MigrateVm::default();
                self.migrate_vm(&requester, vm, &request).await?
            }
        };
        self.outcome(started, None).await.map(drop)
    }
}

impl Progress {
    fn note_failure(&mut self, vm: Vm, error: Error) {
        let failure = self.failures.entry(vm.id);
        let failure = failure.or_insert_with(|| (vm.name, 0, error.clone()));
        failure.1 += 1;
        failure.2 = error;
    }

    fn text(&self, total: usize) -> String {
        let moved = self.moved;
        match self.failures.values().next() {
            None => format!("moved {moved} of {total} VMs"),
            Some((name, _, error)) => format!(
                "moved {moved} of {total} VMs; {} could not be moved so far: {name}: {}",
                self.failures.len(),
                error.message
            ),
        }
    }

    fn failed(&self, host: &str) -> Error {
        let count = self.failures.len();
        let named = self.failures.values().take(NAMED);
        let mut reasons: Vec<String> = named
            .map(|(name, _, error)| format!("{name}: {}", error.message))
            .collect();
        if count > NAMED {
            reasons.push("and others".to_owned());
        }
        let message = format!(
            "{count} VMs stay on {host}, and {} were moved: {}",
            self.moved,
            reasons.join("; ")
        );
        Error::new(ErrorKind::Conflict, message)
            .advise("the host stays drained: make room or destroy these VMs, and evacuate it again")
    }
}
