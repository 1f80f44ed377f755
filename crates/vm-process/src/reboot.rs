//! Boots the guest again in the same VM, when the guest requests a reset.
//!
//! The machine is reset in place, and the kernel is loaded as at the first boot, from files that
//! have been open since the start because the jail has no paths. Sockets, console, network and
//! disks stay. A guest whose kernel panicked is not booted again, because it would most likely
//! panic forever.

use std::sync::{Arc, TryLockError};

use clone_api::config::OnReboot;
use clone_vmm::machine::{Exit, ExitSignal, Kernel, Machine, MachineError};

use super::machine::locked;
use super::snapshot::{SharedSnapshotSource, SnapshotSource};

/// The policy and the resources of a reboot.
pub(super) struct Reboot {
    wanted: OnReboot,
    /// The kernel to boot, or the reason why there is none.
    kernel: Result<Kernel, String>,
    /// The source of snapshots. A reboot waits while a snapshot holds its lock.
    snapshot_source: SharedSnapshotSource,
}

impl Reboot {
    pub(super) fn new(
        wanted: OnReboot,
        kernel: Result<Kernel, String>,
        snapshot_source: SharedSnapshotSource,
    ) -> Self {
        Self {
            wanted,
            kernel,
            snapshot_source,
        }
    }

    /// Handles the guest's request for a reset: boots the guest again, or returns how the VM ends.
    /// While a snapshot is taken, it does neither; the signal wakes the event loop at the end of
    /// the snapshot.
    pub(super) fn grant(&mut self, signal: &ExitSignal) -> Option<Exit> {
        if self.wanted == OnReboot::Stop {
            tracing::info!("the guest rebooted, which is to end its VM (on_reboot)");
            return Some(Exit::Reboot);
        }
        // The signal is drained before the lock is tried, so that a snapshot that ends after the
        // attempt wakes the event loop again.
        signal.drain();
        let snapshot_source = Arc::clone(&self.snapshot_source);
        let mut snapshot_source = match snapshot_source.try_lock() {
            Ok(snapshot_source) => snapshot_source,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let machine = Arc::clone(&snapshot_source.machine);
        let mut machine = locked(&machine);
        let was_running = machine.is_running();
        if let Err(error) = machine.pause() {
            return Some(Exit::Crash(format!("the reboot failed: {error}")));
        }
        if machine.asked_for_warm_reset() {
            return Some(Exit::Crash(
                "the guest's kernel panicked; `clone logs` has its last words".to_owned(),
            ));
        }
        let kernel = match &mut self.kernel {
            Ok(kernel) => kernel,
            Err(missing) => {
                tracing::error!("the guest cannot reboot, so its VM ends: {missing}");
                return Some(Exit::Reboot);
            }
        };
        match boot_again(&mut machine, &mut snapshot_source, kernel, was_running) {
            Ok(()) => {
                tracing::info!("the guest rebooted");
                None
            }
            Err(error) => Some(Exit::Crash(format!("the reboot failed: {error}"))),
        }
    }
}

fn boot_again(
    machine: &mut Machine,
    snapshot_source: &mut SnapshotSource,
    kernel: &mut Kernel,
    run: bool,
) -> Result<(), MachineError> {
    machine.pause()?.reset()?;
    snapshot_source
        .dirty_tracker
        .renewed(Arc::clone(machine.memory()));
    machine.boot(kernel)?;
    // A VM that was paused at the moment of the request stays paused.
    if run {
        machine.resume()?;
    }
    Ok(())
}
