//! The machine, shared between the event loop and snapshots, and the conversion of its errors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clone_api::{ApiError, ErrorCode};
use clone_vmm::machine::{Machine, MachineError};
use clone_vmm::vcpu::{Refusal, VcpuError};

/// Locked for one call at a time by the event loop's thread, and by a snapshot's for as long as it
/// keeps the guest paused.
pub(super) type SharedMachine = Arc<Mutex<Machine>>;

pub(super) fn locked(machine: &SharedMachine) -> MutexGuard<'_, Machine> {
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
