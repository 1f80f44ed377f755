//! VMs that move to another host, or come from one.
//!
//! The journals of both hosts have the move before anything of it begins, with the epoch in which the VM
//! runs at the destination. Which of the two VM processes may run the guest is decided between them
//! ([`clone_host::migrate`]). This module starts them, reports what has become of them, and tells them
//! what the controller has decided where they do not know.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;

use army_api::vms::VmState;
use army_node_api::requests::{
    AcceptVmRequest, DecideMoveRequest, ExpectVmRequest, MoveDecision, MoveStatus, Presence,
    SendVmRequest, SentVm, VmOffer,
};
use army_node_api::{Error, ErrorKind, Result};
use clone_api::Client;
use clone_api::control::{Custody, MigrationStatus, VmState as Machine};
use clone_host::migrate::{self, Link, Needs, Options, Policy};

use crate::journal::{Departure, Entry, Stage};
use crate::supervise::boot_ms;
use crate::{Node, cpu_features, lock, vm_name};

/// The VMs that this process is sending or receiving, and why the last attempt of others has failed.
#[derive(Default)]
pub(crate) struct Transfers(Mutex<HashMap<String, Transfer>>);

enum Transfer {
    Running,
    Failed(String),
}

impl Transfers {
    /// Begins the transfer of a VM.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where one is running.
    fn begin(&self, id: &str) -> Result<()> {
        let mut transfers = lock(&self.0);
        if let Some(Transfer::Running) = transfers.get(id) {
            return Err(still_running());
        }
        transfers.insert(id.to_owned(), Transfer::Running);
        Ok(())
    }

    fn end(&self, id: &str, failure: Option<&Error>) {
        let mut transfers = lock(&self.0);
        match failure {
            Some(error) => {
                transfers.insert(id.to_owned(), Transfer::Failed(error.message.clone()));
            }
            None => {
                transfers.remove(id);
            }
        }
    }

    fn is_running(&self, id: &str) -> bool {
        matches!(lock(&self.0).get(id), Some(Transfer::Running))
    }

    fn failure(&self, id: &str) -> Option<String> {
        match lock(&self.0).get(id) {
            Some(Transfer::Failed(reason)) => Some(reason.clone()),
            _ => None,
        }
    }
}

fn still_running() -> Error {
    Error::new(
        ErrorKind::Conflict,
        "the VM is still being sent or received",
    )
}

impl Node {
    /// What another host must have for a VM.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] for a VM that cannot be moved, with the reason.
    pub fn offer(&self, id: &str) -> Result<VmOffer> {
        let entry = self.journal.get(id)?;
        entry.check_changeable()?;
        let needs = match entry.suspended {
            true => self.needs_of_suspended(id)?,
            false => {
                self.check_no_checkpoints(id)?;
                migrate::needs(&self.find(id)?)?
            }
        };
        let (template, template_id) = needs.template.ok_or_else(|| {
            let message = "the VM was not forked from a template of this host's store";
            Error::new(ErrorKind::Conflict, message)
        })?;
        Ok(VmOffer {
            template,
            template_id,
            private_bytes: needs.private_bytes,
            cpu: Some(cpu_features(needs.cpu)),
            ceiling: entry.ceiling,
        })
    }

    fn needs_of_suspended(&self, id: &str) -> Result<Needs> {
        let suspended = self.runtime.suspended()?.find(&vm_name(id))?;
        let suspended = suspended.ok_or_else(|| crate::not_running(id))?;
        let template = suspended.record.template().and_then(Path::file_name);
        let template = template.map(|name| name.to_string_lossy().into_owned());
        let name = template.ok_or_else(|| {
            let message = "the VM was not forked from a template of this host's store";
            Error::new(ErrorKind::Conflict, message)
        })?;
        let template = self.open_template(&name)?;
        let state = std::fs::metadata(suspended.dir().join("memory"));
        Ok(Needs {
            template: Some((name, template.manifest().id.clone())),
            cpu: template.content().cpu.clone(),
            private_bytes: state.map_or(0, |state| state.blocks().saturating_mul(512)),
        })
    }

    fn check_no_checkpoints(&self, id: &str) -> Result<()> {
        if !self.has_checkpoints(id) {
            return Ok(());
        }
        let message = "the VM has checkpoints, which would be lost";
        Err(Error::new(ErrorKind::Conflict, message)
            .advise("remove them first: army vm checkpoint rm"))
    }

    /// Prepares to receive a VM.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the host has the VM, or knows it in this epoch or a later one, and
    /// [`ErrorKind::NotFound`] where the host has not got its template.
    pub fn expect(&self, request: &ExpectVmRequest) -> Result<()> {
        let facts = self.template(&request.template)?;
        if facts.id != request.template_id {
            let message = format!(
                "the host has another template that is called `{}`",
                request.template
            );
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let id = &request.vm.id;
        self.turns.take(id, || {
            if self.transfers.is_running(id) {
                return Err(still_running());
            }
            if let Ok(known) = self.journal.get(id) {
                if known.stage.is_alive() {
                    let message = format!("the VM {} is on this host already", known.name);
                    return Err(Error::new(ErrorKind::Conflict, message));
                }
                self.end_process(id)?;
                self.runtime.discard_suspended(&vm_name(id))?;
            }
            let mut entry = Entry::from(&request.vm).beginning(boot_ms());
            entry.stage = Stage::Arriving;
            entry.revision = request.revision;
            entry.ceiling.clone_from(&request.ceiling);
            entry.arrives_as = (request.then != VmState::Running).then_some(request.then);
            self.journal.begin(&entry)?;
            self.transfers.end(id, None);
            Ok(())
        })
    }

    /// Begins to receive a VM that is expected. What follows is [`Node::receive`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where it is not expected.
    pub(crate) fn begin_arrival(&self, request: &AcceptVmRequest) -> Result<()> {
        let entry = self.journal.get(&request.vm)?;
        if entry.stage != Stage::Arriving {
            let message = format!("the VM {} is not expected", request.vm);
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        self.transfers.begin(&request.vm)
    }

    /// Records that a VM cannot be received.
    pub(crate) fn refuse_arrival(&self, id: &str, error: &Error) {
        let refused = self
            .journal
            .advance(id, Stage::Failed(error.message.clone()));
        if let Err(error) = refused {
            tracing::error!(vm = id, %error, "cannot write the journal");
        }
        self.transfers.end(id, Some(error));
    }

    /// Receives a VM over `link`, and lets it go on.
    pub(crate) fn receive(&self, id: &str, link: Link) {
        let received = self.try_receive(id, link);
        match &received {
            Ok(()) => self.transfers.end(id, None),
            Err(error) => {
                tracing::warn!(vm = id, %error, "a VM did not arrive");
                self.transfers.end(id, Some(error));
            }
        }
    }

    fn try_receive(&self, id: &str, link: Link) -> Result<()> {
        let entry = self.journal.get(id)?;
        let policy = Policy {
            name: Some(vm_name(id)),
            only_templates: true,
            reach: self.reach_of(&entry)?,
        };
        match migrate::receive(&self.runtime, &self.store, link, &policy) {
            Ok(arrived) => {
                for notice in &arrived.notices {
                    tracing::warn!(vm = id, "{notice}");
                }
                self.turns.take(id, || self.settle_arrival(id))
            }
            Err(error) => {
                let error = Error::from(error);
                match self.custody(id)?.map(|status| status.custody) {
                    Some(Custody::Here) => self.turns.take(id, || self.settle_arrival(id))?,
                    // The controller decides.
                    Some(Custody::Arrived) => {}
                    _ => {
                        let stage = Stage::Failed(error.message.clone());
                        self.journal.advance(id, stage)?;
                        self.end_process(id)?;
                    }
                }
                Err(error)
            }
        }
    }

    /// Records that a VM has arrived and runs, and gives it the state that it had. This is done in a
    /// turn.
    fn settle_arrival(&self, id: &str) -> Result<()> {
        let mut then = None;
        self.journal.record_move(id, |entry| {
            if entry.stage == Stage::Arriving {
                entry.stage = Stage::Running;
                then = entry.arrives_as.take();
            }
        })?;
        self.mark_used(id);
        self.reports.invalidate(id);
        self.restore_state(id, then);
        Ok(())
    }

    /// Pauses or suspends a VM that was paused or suspended before its move. It runs where that fails.
    fn restore_state(&self, id: &str, state: Option<VmState>) {
        let restored = match state {
            Some(VmState::Paused) => self.pause(id),
            Some(VmState::Suspended) => self.suspend_in_turn(id),
            _ => return,
        };
        if let Err(error) = restored {
            tracing::warn!(vm = id, %error, "a VM that was moved runs, and did not before");
        }
    }

    /// Continues with a VM that was arriving when an earlier process of the node ended. One that has
    /// not arrived is still where it was.
    pub(crate) fn recover_arrival(&self, entry: &Entry) {
        let recovered = match self.custody(&entry.id) {
            Ok(Some(status)) if status.custody == Custody::Here => self.settle_arrival(&entry.id),
            Ok(Some(status)) if status.custody == Custody::Arrived => Ok(()),
            Ok(_) => {
                self.end(entry, "the node was restarted while the VM arrived", true);
                Ok(())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = recovered {
            tracing::error!(vm = entry.id, %error, "a VM that was arriving is not recovered");
        }
    }

    /// Begins to send a VM: it is awake from now on, and nothing else changes it. What follows is
    /// [`Node::depart`].
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the VM cannot be sent, or not in this epoch.
    pub(crate) fn begin_departure(&self, request: &SendVmRequest) -> Result<()> {
        let id = &request.vm;
        self.turns.take(id, || {
            let entry = self.journal.get(id)?;
            entry.check_changeable()?;
            if request.epoch <= entry.epoch {
                return Err(stale(&entry, request.epoch));
            }
            if self.transfers.is_running(id) {
                return Err(still_running());
            }
            let vm = match entry.suspended {
                true => self.wake(&entry)?,
                false => self.find(id)?,
            };
            self.check_no_checkpoints(id)?;
            let client = Client::new(vm.dir.control_socket());
            let is_paused = client.info()?.state == Machine::Paused;
            let former = match (entry.suspended, is_paused) {
                (true, _) => VmState::Suspended,
                (false, true) => VmState::Paused,
                (false, false) => VmState::Running,
            };
            self.transfers.begin(id)?;
            let begun = match is_paused {
                true => client.resume().map_err(Error::from),
                false => Ok(()),
            };
            let begun = begun.and_then(|()| {
                self.journal.record_move(id, |entry| {
                    entry.departure = Some(Departure {
                        to: request.to.clone(),
                        epoch: request.epoch,
                        former,
                        stayed: false,
                    });
                })
            });
            self.reports.invalidate(id);
            begun.inspect_err(|error| self.transfers.end(id, Some(error)))
        })
    }

    /// Sends a VM over `link`, and returns when it runs on the other host.
    pub(crate) fn depart(&self, request: &SendVmRequest, link: Link) -> Result<SentVm> {
        let options = Options {
            bytes_per_second: request.bytes_per_second,
            max_pause_ms: None,
        };
        let vm = self.find(&request.vm);
        let sent = vm.and_then(|vm| Ok(migrate::send(&self.runtime, &vm, link, &options)?));
        let sent = sent.map(|done| SentVm {
            bytes: done.bytes,
            pause_us: done.pause_us,
            total_us: done.total_us,
            rounds: done.rounds,
        });
        self.end_departure(&request.vm, sent.as_ref().err());
        sent
    }

    /// Records how sending a VM has ended. Where the VM is here, that is known for certain only as long
    /// as its process says so.
    pub(crate) fn end_departure(&self, id: &str, failure: Option<&Error>) {
        if failure.is_some() {
            let custody = self.custody(id).ok().flatten();
            let stayed = custody.is_some_and(|status| status.custody == Custody::Here);
            let recorded = self.journal.record_move(id, |entry| {
                if let Some(departure) = &mut entry.departure {
                    departure.stayed = stayed;
                }
            });
            if let Err(error) = recorded {
                tracing::error!(vm = id, %error, "cannot write the journal");
            }
        }
        self.reports.invalidate(id);
        self.transfers.end(id, failure);
    }

    /// What the process of a VM says about its move; `None` where there is no process.
    fn custody(&self, id: &str) -> Result<Option<MigrationStatus>> {
        let vm = match self.runtime.find(&vm_name(id)) {
            Ok(vm) => vm,
            Err(error) if error.code == clone_api::ErrorCode::NotFound => return Ok(None),
            Err(_) if self.journal.get(id).is_ok_and(|it| it.suspended) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match Client::new(vm.dir.control_socket()).migration() {
            Ok(status) => Ok(Some(status)),
            // It has ended meanwhile.
            Err(_) if vm.process.wait(Some(std::time::Duration::ZERO))? => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Says where a VM is that is being moved.
    ///
    /// # Errors
    /// Where the VM's process does not answer.
    pub fn inspect_move(&self, id: &str) -> Result<MoveStatus> {
        // It is looked at before the process: a transfer that ends meanwhile is seen the next time.
        let is_running = self.transfers.is_running(id);
        let Ok(entry) = self.journal.get(id) else {
            return Ok(MoveStatus {
                presence: Presence::Absent,
                epoch: 0,
                departure: None,
                reason: None,
                sent_bytes: None,
            });
        };
        let status = self.custody(id)?;
        let progress = status.as_ref().and_then(|status| status.progress);
        let custody = status.map(|status| status.custody);
        let mut reason = self.transfers.failure(id);
        let presence = match (&entry.stage, &entry.departure) {
            (Stage::Ended(why), _) => {
                reason = Some(why.clone());
                Presence::Ended
            }
            (Stage::Failed(why), _) => {
                reason = Some(why.clone());
                Presence::Absent
            }
            (Stage::Arriving, _) if is_running => Presence::Receiving,
            (Stage::Arriving, _) => match custody {
                Some(Custody::Here) => Presence::Here,
                Some(Custody::Arrived) => Presence::Arrived,
                _ => Presence::Absent,
            },
            (Stage::Begun, _) | (Stage::Running, None) => Presence::Here,
            (Stage::Running, Some(departure)) => match custody {
                _ if is_running => Presence::Sending,
                Some(Custody::Here) if progress.is_some() => Presence::Sending,
                Some(Custody::Here) => Presence::Here,
                Some(_) => Presence::Moved,
                None if departure.stayed => Presence::Ended,
                None => Presence::Left,
            },
        };
        Ok(MoveStatus {
            presence,
            epoch: entry.epoch,
            departure: entry.departure.map(|departure| departure.epoch),
            reason,
            sent_bytes: progress.map(|progress| progress.sent_bytes),
        })
    }

    /// Carries out the controller's decision about a VM that was being moved.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where it cannot be carried out now, or contradicts what the host knows.
    pub fn decide_move(&self, request: &DecideMoveRequest) -> Result<()> {
        let id = &request.vm;
        self.turns.take(id, || {
            let entry = match self.journal.get(id) {
                Ok(entry) => entry,
                Err(error) => {
                    return match request.decision {
                        MoveDecision::Here => Err(error),
                        MoveDecision::Elsewhere => Ok(()),
                    };
                }
            };
            if request.epoch < entry.epoch {
                return Err(stale(&entry, request.epoch));
            }
            if self.transfers.is_running(id) {
                return Err(still_running());
            }
            match request.decision {
                MoveDecision::Here => self.keep(&entry, request.epoch),
                MoveDecision::Elsewhere => self.release(&entry),
            }
        })
    }

    /// Lets a VM run here.
    fn keep(&self, entry: &Entry, epoch: u64) -> Result<()> {
        let id = &entry.id;
        match (&entry.stage, &entry.departure) {
            (Stage::Arriving, _) => {
                match self.custody(id)?.map(|status| status.custody) {
                    Some(Custody::Arrived) => self.tell(id, true)?,
                    Some(Custody::Here) => {}
                    _ => {
                        let message = format!("the VM {} has not arrived", entry.name);
                        return Err(Error::new(ErrorKind::Conflict, message));
                    }
                }
                self.journal.record_move(id, |entry| entry.epoch = epoch)?;
                self.settle_arrival(id)
            }
            (Stage::Running, Some(departure)) => {
                let custody = self.custody(id)?.map(|status| status.custody);
                if custody == Some(Custody::Moved) {
                    self.tell(id, false)?;
                }
                let former = departure.former;
                self.journal.record_move(id, |entry| {
                    entry.departure = None;
                    entry.epoch = epoch;
                })?;
                self.transfers.end(id, None);
                self.reports.invalidate(id);
                self.mark_used(id);
                if custody.is_some() {
                    self.restore_state(id, Some(former));
                }
                Ok(())
            }
            (Stage::Running | Stage::Begun, None) => {
                self.journal.record_move(id, |entry| entry.epoch = epoch)
            }
            _ => Ok(()),
        }
    }

    /// Removes what is here of a VM that is on another host.
    fn release(&self, entry: &Entry) -> Result<()> {
        let id = &entry.id;
        let custody = self.custody(id)?.map(|status| status.custody);
        let is_moving = entry.departure.is_some() || entry.stage == Stage::Arriving;
        match (entry.stage.is_alive(), custody) {
            (false, _) => {}
            (true, _) if !is_moving => return Err(runs_here(entry)),
            (true, Some(Custody::Here)) => return Err(runs_here(entry)),
            (true, Some(Custody::Moved)) => self.tell(id, true)?,
            (true, Some(Custody::Arrived)) => self.tell(id, false)?,
            (true, Some(Custody::Incoming) | None) => {}
        }
        self.end_process(id)?;
        self.runtime.discard_suspended(&vm_name(id))?;
        self.journal.forget(id)?;
        self.transfers.end(id, None);
        self.reports.invalidate(id);
        lock(&self.usage).remove(id);
        Ok(())
    }

    fn tell(&self, id: &str, is_where_it_was_moved_to: bool) -> Result<()> {
        let vm = self.runtime.find(&vm_name(id))?;
        Ok(migrate::tell(&self.runtime, &vm, is_where_it_was_moved_to)?)
    }
}

fn stale(entry: &Entry, epoch: u64) -> Error {
    let message = format!(
        "the VM {} is in epoch {} on this host, and the request is of epoch {epoch}",
        entry.name, entry.epoch
    );
    Error::new(ErrorKind::Conflict, message)
}

fn runs_here(entry: &Entry) -> Error {
    let message = format!("the VM {} runs on this host", entry.name);
    Error::new(ErrorKind::Conflict, message)
}
