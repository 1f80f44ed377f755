//! The state of a machine without its RAM and the content of its disks: how it is saved, and how a
//! machine is made from it.

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use super::{Machine, MachineError, Parts, PausedMachine, locked};
use crate::devices::serial::SerialState;
use crate::event_loop::EventLoop;
use crate::irq::ioapic::IoapicState;
use crate::pci::virtio_pci::VirtioPciState;
use crate::vcpu::VcpuState;

/// The longest time that a VM can have run. Beyond it the host's own arithmetic would overflow.
const MAX_CLOCK_NS: u64 = i64::MAX as u64;

/// The state of a paused machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// The CPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// The devices that every machine has.
    pub board: BoardState,
    /// The VM's clock.
    pub clock: VmClock,
    /// The virtio devices, in slot order.
    pub devices: Vec<VirtioPciState>,
}

/// The devices that every machine has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BoardState {
    /// The I/O APIC.
    pub ioapic: IoapicState,
    /// The serial console.
    pub serial: SerialState,
    /// Pending events of the ACPI event device.
    pub power_events: u8,
}

impl BoardState {
    /// The state after power-on.
    pub fn fresh() -> Self {
        Self {
            ioapic: IoapicState::fresh(),
            serial: SerialState::fresh(),
            power_events: 0,
        }
    }
}

/// kvmclock, which guests take their monotonic time from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmClock {
    /// Nanoseconds that the VM has run.
    pub nanoseconds: u64,
}

/// A point in a guest's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestTime {
    clock: VmClock,
    /// Time-stamp counters, one for each CPU.
    tscs: Vec<Option<u64>>,
}

impl MachineState {
    /// The guest's time when the state was saved.
    pub fn time(&self) -> GuestTime {
        GuestTime {
            clock: self.clock,
            tscs: self.vcpus.iter().map(VcpuState::tsc).collect(),
        }
    }
}

impl PausedMachine<'_> {
    /// The machine's state.
    ///
    /// # Errors
    /// Where the state of KVM or of a device cannot be read.
    pub fn save(&mut self) -> Result<MachineState, MachineError> {
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
            board: BoardState {
                ioapic: self.ioapic.save(),
                serial: self.serial.save(),
                power_events: self.power.save(),
            },
            clock: VmClock {
                nanoseconds: clock.clock,
            },
            devices,
        })
    }

    /// Sets the machine back to a point in its guest's time: a machine that was restored some time
    /// before it runs would otherwise find that time gone.
    ///
    /// # Errors
    /// Those of KVM.
    pub fn set_time(&mut self, time: &GuestTime) -> Result<(), MachineError> {
        self.0.set_clock(time.clock)?;
        for (vcpu, tsc) in self.vcpus.iter().zip(&time.tscs) {
            if let Some(tsc) = *tsc {
                vcpu.set_tsc(tsc)?;
            }
        }
        Ok(())
    }
}

impl Machine {
    /// Makes a machine that is paused where `state` was saved. `parts.memory` holds RAM as it was
    /// then, and each device was built from its part of the state ([`VirtioPciState::device`]).
    ///
    /// # Errors
    /// [`MachineError::State`], [`MachineError::Vcpu`] or [`MachineError::Device`] where the state
    /// does not fit these parts or this host.
    pub fn restore(
        parts: Parts,
        state: MachineState,
        events: &mut EventLoop,
    ) -> Result<Self, MachineError> {
        let fits = |what: &str, saved: usize, here: usize| match saved == here {
            true => Ok(()),
            false => Err(MachineError::State(format!(
                "it was saved from a machine with {saved} {what}, and this machine has {here}"
            ))),
        };
        fits("vCPUs", state.vcpus.len(), usize::from(parts.vcpus))?;
        fits("devices", state.devices.len(), parts.devices.len())?;
        if state.clock.nanoseconds > MAX_CLOCK_NS {
            let reason = format!("its clock stands at {} ns", state.clock.nanoseconds);
            return Err(MachineError::State(reason));
        }
        let mut machine = Self::assemble(parts, state.board, events)?;
        machine.set_clock(state.clock)?;
        // CPUs come before devices: a device that finds work may interrupt at once, and the restore
        // of a local APIC overwrites interrupts that came before.
        for (vcpu, saved) in machine.vcpus.iter().zip(state.vcpus) {
            vcpu.restore(saved)?;
        }
        for (transport, saved) in machine.transports.iter().zip(&state.devices) {
            locked(transport).restore(saved)?;
        }
        Ok(machine)
    }

    /// Sets the time that the VM has run. KVM is not asked to add the real time that has passed, so
    /// the guest's monotonic clock continues where it stopped.
    fn set_clock(&mut self, clock: VmClock) -> Result<(), MachineError> {
        let clock = kvm_clock_data {
            clock: clock.nanoseconds,
            ..Default::default()
        };
        self.vm
            .set_clock(&clock)
            .map_err(MachineError::kvm("set the clock"))
    }
}
