//! The machine, shared between the event loop and snapshots, and the conversion of its errors.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clone_api::checkpoints::CheckpointName;
use clone_api::control::{Custody, LastRewind};
use clone_api::{ApiError, ErrorCode};
use clone_vmm::machine::{Machine, MachineError};
use clone_vmm::vcpu::{Refusal, VcpuError, monotonic_ns};

use super::run_once::RunOnce;

/// The machine of a VM. Its guest is let run by [`GuestMachine::resume`] alone.
pub(super) struct GuestMachine {
    machine: Machine,
    /// Who may run the guest.
    custody: Custody,
    /// The mark of the saved state that the paused guest is in, to be set before it runs again.
    saved: Option<RunOnce>,
    /// Set while a rewind has changed a part of the VM: the guest must not run.
    incomplete: Option<Incomplete>,
    last_rewind: Option<LastRewind>,
}

/// A rewind that has not been completed.
struct Incomplete {
    /// Whether the guest ran before.
    was_running: bool,
    /// Why the rewind was not completed; empty while it is in progress.
    reason: String,
}

impl GuestMachine {
    /// A machine that is in no saved state.
    pub(super) fn new(machine: Machine, custody: Custody) -> Self {
        Self {
            machine,
            custody,
            saved: None,
            incomplete: None,
            last_rewind: None,
        }
    }

    /// The last rewind.
    pub(super) fn last_rewind(&self) -> Option<LastRewind> {
        self.last_rewind.clone()
    }

    /// Whether the guest ran before the rewind that was not completed, or runs.
    pub(super) fn ran_before_rewind(&self) -> bool {
        let interrupted = self.incomplete.as_ref().is_some_and(|it| it.was_running);
        interrupted || self.machine.is_running()
    }

    /// Forbids the guest to run until a rewind is completed.
    pub(super) fn begin_rewind(&mut self, was_running: bool) {
        self.incomplete = Some(Incomplete {
            was_running,
            reason: String::new(),
        });
    }

    /// Records why the rewind was not completed.
    pub(super) fn fail_rewind(&mut self, reason: &str) {
        if let Some(incomplete) = &mut self.incomplete {
            reason.clone_into(&mut incomplete.reason);
        }
    }

    /// Lets the guest run again, in the state of `checkpoint`.
    pub(super) fn complete_rewind(&mut self, checkpoint: &CheckpointName) {
        self.incomplete = None;
        self.last_rewind = Some(LastRewind {
            checkpoint: checkpoint.clone(),
            monotonic_ns: monotonic_ns(),
        });
    }

    /// Returns an error while the VM is in no state that its guest was ever in.
    pub(super) fn check_whole(&self) -> Result<(), ApiError> {
        match &self.incomplete {
            None => Ok(()),
            Some(Incomplete { reason, .. }) => {
                let message = format!("the VM was rewound only in part: {reason}");
                Err(ApiError::new(ErrorCode::Conflict, message)
                    .advise("rewind it again, to the same checkpoint or another one"))
            }
        }
    }

    /// Who may run the guest.
    pub(super) fn custody(&self) -> Custody {
        self.custody
    }

    /// Changes who may run the guest, which is paused. A saved state of it is void at once: it must
    /// not be valid here while the guest runs elsewhere.
    ///
    /// # Errors
    /// The state cannot be marked; nothing has changed then.
    pub(super) fn set_custody(&mut self, custody: Custody) -> std::io::Result<()> {
        if let Some(mark) = &self.saved {
            mark.mark()?;
            self.saved = None;
        }
        self.custody = custody;
        Ok(())
    }

    /// Refuses what only the process that may run the guest can do.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`], with advice.
    pub(super) fn check_custody(&self) -> Result<(), ApiError> {
        let (message, advice) = match self.custody {
            Custody::Here => return Ok(()),
            Custody::Incoming => (
                "the VM is on its way from another host",
                "wait for the migration to end",
            ),
            Custody::Arrived => (
                "the VM has arrived from another host, and may still be there",
                "look there; then let it run here (clone migrate --confirm), or not (--cancel)",
            ),
            Custody::Moved => (
                "the VM was given to another host, which has not said that it runs there",
                "look there; then end it here (clone migrate --confirm), or let it go on here \
                 (--cancel)",
            ),
        };
        Err(ApiError::new(ErrorCode::Conflict, message).advise(advice))
    }

    /// Records that the paused guest is in a saved state, which is void as soon as it runs. The
    /// state saved before is void at once: two states of one VM must never both be valid.
    pub(super) fn in_saved_state(&mut self, mark: RunOnce) -> std::io::Result<()> {
        match self.saved.replace(mark) {
            Some(former) => former.mark(),
            None => Ok(()),
        }
    }

    /// Resumes the guest, whose saved state is void from then on.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] for a guest that another host may run, or that was rewound only in
    /// part, else the host's.
    pub(super) fn resume(&mut self) -> Result<(), ApiError> {
        self.check_custody()?;
        self.check_whole()?;
        if let Some(mark) = &self.saved {
            let marked = mark.mark();
            marked.map_err(|error| {
                ApiError::internal(&error).advise("the VM stays paused: make room on that disk")
            })?;
            self.saved = None;
        }
        self.machine.resume().map_err(machine_error)
    }
}

impl Deref for GuestMachine {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl DerefMut for GuestMachine {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }
}

/// Locked for one call at a time by the event loop's thread, and by a snapshot's for as long as it
/// keeps the guest paused.
pub(super) type SharedMachine = Arc<Mutex<GuestMachine>>;

pub(super) fn locked(machine: &SharedMachine) -> MutexGuard<'_, GuestMachine> {
    // After a panic the machine may be inconsistent, but it must still be ended in order.
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Converts a machine's error to one for the user, with advice.
pub(super) fn machine_error(error: MachineError) -> ApiError {
    let coded = |code| ApiError {
        code,
        ..ApiError::internal(&error)
    };
    match &error {
        MachineError::Missing(_) => coded(ErrorCode::HostUnsupported)
            .advise("use a newer kernel; 6.7 or newer has everything"),
        MachineError::Vcpu(VcpuError::Refused { refusal, .. }) => match refusal {
            Refusal::Vendor { .. } | Refusal::Exceeds(_) => coded(ErrorCode::HostUnsupported)
                .advise("use a host with the same CPU or a newer one of its kind"),
            Refusal::Invalid(_) => coded(ErrorCode::InvalidConfig)
                .advise("take the snapshot again: this one was damaged or made by hand"),
        },
        _ => coded(ErrorCode::Internal),
    }
}
