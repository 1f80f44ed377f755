//! The state of a machine without its RAM and the content of its disks: how it is saved, and how a
//! machine, new or one that has run, is put into it. A new machine is assembled and then restored
//! in place, so there is one mechanism.

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use super::{Machine, MachineError, Parts, PausedMachine, locked};
use crate::devices::serial::SerialState;
use crate::event_loop::EventLoop;
use crate::irq::ioapic::IoapicState;
use crate::pci::virtio_pci::VirtioPciState;
use crate::vcpu::{CheckedState, VcpuState};

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

/// The reason for which a machine was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state does not fit this machine or this host. The machine is as it was.
    #[error(transparent)]
    Refused(MachineError),
    /// The restore failed after it had begun. The machine must not run until it is restored or
    /// reset.
    #[error("the machine's state is restored only in part: {0}")]
    Incomplete(#[source] MachineError),
}

impl From<RestoreError> for MachineError {
    /// For a caller that gives the machine up in either case.
    fn from(error: RestoreError) -> Self {
        let (RestoreError::Refused(error) | RestoreError::Incomplete(error)) = error;
        error
    }
}

impl PausedMachine<'_> {
    /// Checks all that can be known of a state without putting it into the machine: that it is of
    /// a machine of the same shape, that this host can run its CPUs, and that each device can take
    /// over its part. RAM is not looked at.
    ///
    /// # Errors
    /// [`MachineError::State`], [`MachineError::Vcpu`] or [`MachineError::Device`].
    pub fn check(&self, state: &MachineState) -> Result<(), MachineError> {
        self.checked_vcpus(state).map(drop)
    }

    /// Puts the machine where `state` was saved, in place: no KVM object and no host resource is
    /// made, so this works inside a jail, and whatever ran in the machine before is forgotten, with
    /// the machine's reason to end if that was a reboot. The caller has put RAM back before, except
    /// that pages which are missing may follow while nothing waits for them.
    ///
    /// The guest's clocks continue from the state's (see [`PausedMachine::set_time`]). Connections
    /// of the vsock device end, and its driver is told so. Interfaces announce themselves. What the
    /// host decides stays: hardware addresses, rate limits, files.
    ///
    /// # Errors
    /// [`RestoreError::Refused`] before anything is changed, [`RestoreError::Incomplete`] after.
    pub fn restore(&mut self, state: &MachineState) -> Result<(), RestoreError> {
        let vcpus = self.checked_vcpus(state).map_err(RestoreError::Refused)?;
        self.put(state, vcpus).map_err(RestoreError::Incomplete)?;
        self.exit.clear_reboot();
        Ok(())
    }

    fn checked_vcpus(&self, state: &MachineState) -> Result<Vec<CheckedState>, MachineError> {
        let fits = |what: &str, saved: usize, here: usize| match saved == here {
            true => Ok(()),
            false => Err(MachineError::State(format!(
                "it was saved from a machine with {saved} {what}, and this machine has {here}"
            ))),
        };
        fits("vCPUs", state.vcpus.len(), self.vcpus.len())?;
        fits("devices", state.devices.len(), self.transports.len())?;
        if state.clock.nanoseconds > MAX_CLOCK_NS {
            let reason = format!("its clock stands at {} ns", state.clock.nanoseconds);
            return Err(MachineError::State(reason));
        }
        let serial = state.board.serial.check();
        serial.map_err(|reason| MachineError::State(reason.to_owned()))?;
        for (transport, saved) in self.transports.iter().zip(&state.devices) {
            locked(transport).check(saved)?;
        }
        let vcpus = self.vcpus.iter().zip(&state.vcpus);
        vcpus
            .map(|(vcpu, saved)| Ok(vcpu.check(saved.clone())?))
            .collect()
    }

    fn put(&mut self, state: &MachineState, vcpus: Vec<CheckedState>) -> Result<(), MachineError> {
        // Devices stop first, so that none interrupts the CPUs that are restored.
        for transport in &self.transports {
            locked(transport).stop();
        }
        let BoardState {
            ioapic,
            serial,
            power_events,
        } = state.board.clone();
        self.ioapic.restore(ioapic);
        self.serial
            .restore(serial)
            .map_err(MachineError::host("restore the serial console"))?;
        self.power.restore(power_events);
        self.0.set_clock(state.clock)?;
        // CPUs come before devices: a device that finds work may interrupt at once, and the restore
        // of a local APIC overwrites interrupts that came before.
        for (vcpu, saved) in self.vcpus.iter().zip(vcpus) {
            vcpu.restore(saved)?;
        }
        for (transport, saved) in self.transports.iter().zip(&state.devices) {
            locked(transport).restore(saved)?;
        }
        Ok(())
    }
}

impl Machine {
    /// Makes a machine that is paused where `state` was saved. `parts.memory` holds RAM as it was
    /// then, and the devices are new.
    ///
    /// # Errors
    /// Those of [`Machine::new`] and of [`PausedMachine::restore`].
    pub fn restore(
        parts: Parts,
        state: &MachineState,
        events: &mut EventLoop,
    ) -> Result<Self, MachineError> {
        let mut machine = Self::new(parts, events)?;
        machine.pause()?.restore(state)?;
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
