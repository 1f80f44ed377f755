//! The word by which somebody who has looked at both hosts says where a VM is.

use std::io;

use clone_api::control::Custody;
use clone_api::{ApiError, ErrorCode};
use clone_start::error::Result;
use clone_vmm::machine::{Exit, ExitSignal};

use super::super::machine::{GuestMachine, locked};
use super::super::snapshot::{SharedSnapshotSource, exclusive};

/// The VM is where it was moved to.
///
/// # Errors
/// [`ErrorCode::Conflict`] while it is being moved, and for one that is in no migration.
pub(crate) fn confirm(snapshot_source: &SharedSnapshotSource, exit: &ExitSignal) -> Result<()> {
    decide(snapshot_source, exit, Custody::Arrived, Custody::Moved)
}

/// The VM is where it was before its migration.
///
/// # Errors
/// As for [`confirm`].
pub(crate) fn cancel(snapshot_source: &SharedSnapshotSource, exit: &ExitSignal) -> Result<()> {
    decide(snapshot_source, exit, Custody::Moved, Custody::Arrived)
}

/// Lets a VM run that is in the custody `runs`, and ends the process of one in `ends`.
fn decide(
    snapshot_source: &SharedSnapshotSource,
    exit: &ExitSignal,
    runs: Custody,
    ends: Custody,
) -> Result<()> {
    let source = exclusive(snapshot_source)?;
    let mut machine = locked(&source.machine);
    match machine.custody() {
        custody if custody == runs => take_over(&mut machine, custody),
        custody if custody == ends => {
            exit.send(Exit::Killed);
            Ok(())
        }
        _ => {
            let message = "the VM neither was given to another host nor has arrived from one";
            Err(ApiError::new(ErrorCode::Conflict, message))
        }
    }
}

/// Lets the guest run here. If it cannot, its custody stays as it was `before`.
fn take_over(machine: &mut GuestMachine, before: Custody) -> Result<()> {
    let internal = |error: io::Error| ApiError::internal(&error);
    machine.set_custody(Custody::Here).map_err(internal)?;
    machine.resume().inspect_err(|_| {
        // Nothing is to be marked, so this cannot fail.
        let _ = machine.set_custody(before);
    })
}
