//! The whole of a machine's state but its RAM and its disks' content.

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use super::{Machine, MachineError, locked};
use crate::devices::serial::SerialState;
use crate::irq::ioapic::IoapicState;
use crate::pci::virtio_pci::VirtioPciState;
use crate::vcpu::VcpuState;

/// The state of a paused machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// CPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// The I/O APIC.
    pub ioapic: IoapicState,
    /// The serial console.
    pub serial: SerialState,
    /// Pending events of the ACPI event device.
    pub power_events: u8,
    /// The VM's clock.
    pub clock: kvm_clock_data,
    /// The virtio devices, in slot order.
    pub devices: Vec<VirtioPciState>,
}

impl Machine {
    /// The state of a paused machine.
    ///
    /// # Errors
    /// Where KVM or a device cannot tell its state, and where the machine is running.
    pub fn save(&mut self) -> Result<MachineState, MachineError> {
        if self.running {
            return Err(MachineError::State("the machine is running".to_owned()));
        }
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.save())
            .collect::<Result<_, _>>()?;
        let devices = self
            .transports
            .iter()
            .map(|device| locked(device).save())
            .collect::<Result<_, _>>()?;
        let clock = self
            .vm
            .get_clock()
            .map_err(MachineError::kvm("read the clock"))?;
        Ok(MachineState {
            vcpus,
            ioapic: self.ioapic.save(),
            serial: self.serial.save(),
            power_events: self.power.save(),
            clock,
            devices,
        })
    }
}
