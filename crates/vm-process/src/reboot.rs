//! Booting the guest again, in the same VM: what a reset asked for by the guest does.
//!
//! The machine is reset in place, and the kernel, kept open from the start since there are no paths
//! in the jail, is loaded as at the first boot. Sockets, console, network and disks stay. A guest
//! whose kernel panicked is not booted again: it would most likely panic for ever.

use std::sync::{Arc, TryLockError};

use clone_api::config::OnReboot;
use clone_vmm::machine::{Exit, ExitSignal, Kernel, Machine, MachineError};

use super::machine::locked;
use super::snapshot::{SharedSubject, Subject};

/// What a reboot needs.
pub(super) struct Reboot {
    wanted: OnReboot,
    /// What boots; or why there is nothing to boot.
    kernel: Result<Kernel, String>,
    /// What a reboot must not disturb while a snapshot of it is taken.
    subject: SharedSubject,
}

impl Reboot {
    pub(super) fn new(
        wanted: OnReboot,
        kernel: Result<Kernel, String>,
        subject: SharedSubject,
    ) -> Self {
        Self {
            wanted,
            kernel,
            subject,
        }
    }

    /// The guest asked for a reset: boots it again, or tells how the VM ends. While a snapshot is
    /// taken it does neither: the signal wakes the event loop when that is over.
    pub(super) fn grant(&mut self, signal: &ExitSignal) -> Option<Exit> {
        if self.wanted == OnReboot::Stop {
            tracing::info!("the guest rebooted, which is to end its VM (on_reboot)");
            return Some(Exit::Reboot);
        }
        // Before the look at the subject: what ends after it is heard of again.
        signal.drain();
        let subject = Arc::clone(&self.subject);
        let mut subject = match subject.try_lock() {
            Ok(subject) => subject,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let machine = Arc::clone(&subject.machine);
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
        match boot_again(&mut machine, &mut subject, kernel, was_running) {
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
    subject: &mut Subject,
    kernel: &mut Kernel,
    run: bool,
) -> Result<(), MachineError> {
    machine.pause()?.reset()?;
    subject.lineage.renewed(Arc::clone(machine.memory()));
    machine.boot(kernel)?;
    // It may have been paused in the very moment it asked.
    if run {
        machine.resume()?;
    }
    Ok(())
}
