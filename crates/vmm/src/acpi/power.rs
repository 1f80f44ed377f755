//! The registers behind the ACPI tables: sleep control, reset, pending events.

use std::sync::{Arc, Mutex, PoisonError};

use super::EVENT_PIN;
use crate::bus::BusDevice;
use crate::exit::{Exit, ExitSignal};
use crate::irq::ioapic::Ioapic;

/// The first port of the register block.
pub const PORT_BASE: u16 = 0x600;
/// The number of ports in the block.
pub const PORT_SIZE: u64 = 8;
/// `SLEEP_CONTROL_REG` (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = PORT_BASE;
/// `SLEEP_STATUS_REG`.
pub const SLEEP_STATUS_PORT: u16 = PORT_BASE + 1;
/// `RESET_REG`.
pub const RESET_PORT: u16 = PORT_BASE + 2;
/// The pending events of the event device, one bit each. Reading clears them.
pub const EVENT_PORT: u16 = PORT_BASE + 4;

/// The value that the guest writes to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x42;
/// The sleep type for power-off (`\_S5`).
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// The power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;
/// The generation id changed.
pub const EVENT_GENERATION: u8 = 1 << 1;

/// The ACPI register block of a machine.
pub struct PowerRegisters {
    pending: Mutex<u8>,
    ioapic: Arc<Ioapic>,
    exit: ExitSignal,
}

impl PowerRegisters {
    /// A block that raises its events on the I/O APIC and ends the machine through `exit`.
    pub fn new(ioapic: Arc<Ioapic>, exit: ExitSignal) -> Self {
        Self {
            pending: Mutex::new(0),
            ioapic,
            exit,
        }
    }

    /// Notifies the guest of `events`, one bit each.
    pub fn raise(&self, events: u8) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) |= events;
        self.ioapic.pulse(EVENT_PIN);
    }

    /// The events that the guest has not read yet: the block's whole state.
    pub fn save(&self) -> u8 {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Restores saved pending events without another interrupt, which is in the I/O APIC's state.
    pub fn restore(&self, pending: u8) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = pending;
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == u64::from(EVENT_PORT - PORT_BASE) {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            data[0] = std::mem::take(&mut *pending);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (PORT_BASE + offset as u16, data) {
            (SLEEP_CONTROL_PORT, [value])
                if value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_OFF =>
            {
                self.exit.send(Exit::PowerOff);
            }
            (RESET_PORT, [RESET_VALUE]) => self.exit.send(Exit::Reboot),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::ioapic::IoapicState;
    use crate::irq::testing::RecordingIrqRoutes;

    fn registers() -> (PowerRegisters, ExitSignal) {
        let ioapic = Ioapic::new(
            Arc::new(RecordingIrqRoutes::default()),
            IoapicState::fresh(),
        );
        let exit = ExitSignal::new().unwrap();
        (PowerRegisters::new(Arc::new(ioapic), exit.clone()), exit)
    }

    #[test]
    fn the_guest_powers_off_only_with_the_right_sleep_type() {
        let (registers, exit) = registers();
        registers.write(0, &[SLEEP_ENABLE | 1 << SLEEP_TYPE_SHIFT]);
        assert_eq!(exit.get(), None);
        registers.write(0, &[SLEEP_ENABLE | SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT]);
        assert_eq!(exit.get(), Some(Exit::PowerOff));
    }

    #[test]
    fn the_first_reason_to_end_stays_unless_it_is_a_reboot() {
        let (registers, exit) = registers();
        registers.write(2, &[RESET_VALUE]);
        assert_eq!(exit.get(), Some(Exit::Reboot));
        exit.send(Exit::Killed);
        registers.write(2, &[RESET_VALUE]);
        exit.send(Exit::PowerOff);
        assert_eq!(exit.get(), Some(Exit::Killed));
    }

    #[test]
    fn events_are_read_once() {
        let (registers, _) = registers();
        registers.raise(EVENT_POWER_BUTTON);
        registers.raise(EVENT_GENERATION);
        let mut data = [0xFF];
        registers.read(4, &mut data);
        assert_eq!(data, [EVENT_POWER_BUTTON | EVENT_GENERATION]);
        registers.read(4, &mut data);
        assert_eq!(data, [0]);
    }
}
