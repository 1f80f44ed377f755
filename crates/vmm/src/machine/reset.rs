//! A reset, which puts the machine into the state after power-on, in place.
//!
//! It uses the contract of save and restore: each device forgets its driver
//! ([`VirtioPci::reset`](crate::pci::virtio_pci::VirtioPci::reset)), and the board's devices and
//! the CPUs are put into the states that they are built from. Host resources stay open, and disks
//! keep their content. No new KVM object is created, so a reset works inside the jail.

use std::sync::Arc;

use clone_memory::{GuestMemory, LayerStack};
use vm_memory::{Bytes, GuestAddress};

use super::{BoardState, Machine, MachineError, PausedMachine, locked};
use crate::vcpu::Vcpu;

/// The reset flag in the BIOS data area, which tells a PC's firmware what kind of restart is
/// wanted.
const RESET_FLAG: GuestAddress = GuestAddress(0x472);
/// The value that asks for a restart without a memory test. Linux leaves it where it panics, if it
/// was booted with `reboot=panic_warm`, and 0 where it was asked to reboot
/// (`arch/x86/kernel/reboot.c`).
const WARM: u16 = 0x1234;

impl Machine {
    /// Whether a guest that asked for a reset wants a warm one. With `reboot=panic_warm` on its
    /// command line this means that the guest panicked. [`PausedMachine::reset`] clears the answer.
    pub fn asked_for_warm_reset(&self) -> bool {
        let flag = self.memory.ram().read_obj::<u16>(RESET_FLAG);
        flag.is_ok_and(|flag| flag == WARM)
    }
}

impl PausedMachine<'_> {
    /// Replaces RAM, at the same addresses, by these layers, or by zeros. Returns the new RAM.
    ///
    /// # Errors
    /// Those of the host. RAM is of no use then, and this can be tried again.
    pub fn renew_memory(
        &mut self,
        layers: Option<&LayerStack>,
    ) -> Result<Arc<GuestMemory>, MachineError> {
        let memory = match layers {
            Some(layers) => self.memory.renewed_from_layers(layers)?,
            None => self.memory.renewed()?,
        };
        self.0.memory = Arc::new(memory);
        Ok(Arc::clone(&self.memory))
    }

    /// Puts the machine back to what it was at power-on, with RAM all zero. Its reason to end is
    /// forgotten. [`Machine::boot`] and [`Machine::resume`] follow.
    ///
    /// # Errors
    /// Where KVM or the host refuses. The machine is of no use then.
    pub fn reset(&mut self) -> Result<(), MachineError> {
        // Devices come first: afterwards no part of the host touches RAM.
        for transport in &self.transports {
            locked(transport).reset()?;
        }
        let BoardState {
            ioapic,
            serial,
            power_events,
        } = BoardState::fresh();
        self.serial
            .restore(serial)
            .map_err(MachineError::host("reset the serial console"))?;
        self.power.restore(power_events);
        self.ioapic.restore(ioapic);
        self.vcpus.iter().try_for_each(Vcpu::reset)?;
        self.renew_memory(None)?;
        self.exit.clear();
        Ok(())
    }
}
