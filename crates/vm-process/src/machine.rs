//! The machine as the parts of this process share it, and its errors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clone_api::{ApiError, ErrorCode};
use clone_vmm::machine::{Machine, MachineError};
use clone_vmm::vcpu::{Refusal, VcpuError};

/// Locked for one call at a time by the event loop's thread, and by a snapshot's for as long as it
/// keeps the guest paused.
pub(super) type SharedMachine = Arc<Mutex<Machine>>;

pub(super) fn locked(machine: &SharedMachine) -> MutexGuard<'_, Machine> {
    // After a panic the machine is suspect, but ending it in order is still right.
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine's error for the user.
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
