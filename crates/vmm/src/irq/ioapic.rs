//! The I/O APIC: 24 pins, each with a redirection entry that selects the pin's interrupt.
//!
//! Pins only have edges here ([`Ioapic::pulse`]), as ACPI tells the guest. A pin that is pulsed
//! while it is masked stays pending until it is unmasked, as an edge-triggered input of the real
//! part does.
//!
//! Source: Intel 82093AA datasheet, section 3.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::{IrqRoutes, MsiMessage};
use crate::bus::BusDevice;

/// The number of input pins.
pub const PIN_COUNT: usize = 24;
/// The guest-physical address of the I/O APIC.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// The size of its register window in bytes.
pub const IOAPIC_SIZE: u64 = 0x1000;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;

const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_REDIRECTION: u8 = 0x10;

/// Version 0x11, with the highest redirection entry in bits 16 to 23.
const VERSION: u32 = 0x11 | (PIN_COUNT as u32 - 1) << 16;
const ENTRY_MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR: read-only, and always 0 for edges delivered at once.
const ENTRY_READ_ONLY: u64 = 1 << 12 | 1 << 14;
/// The bits for vector, delivery, polarity, trigger, mask and destination. The others are reserved.
const ENTRY_DEFINED: u64 = 0x1_FFFF | 0xFF << 56;
/// The bits of the id register.
const ID_BITS: u32 = 0x0F00_0000;

/// The saved state of the I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    id: u32,
    select: u8,
    entries: [u64; PIN_COUNT],
    /// A bit per pin that was pulsed while masked.
    pending: u32,
}

impl IoapicState {
    /// After a reset every pin is masked.
    pub fn fresh() -> Self {
        Self {
            id: 0,
            select: 0,
            entries: [ENTRY_MASKED; PIN_COUNT],
            pending: 0,
        }
    }

    /// The same state with only the bits that the registers have. A saved state may have others.
    fn within_registers(mut self) -> Self {
        self.id &= ID_BITS;
        self.pending &= (1 << PIN_COUNT) - 1;
        let entries = self.entries.iter_mut();
        entries.for_each(|entry| *entry &= ENTRY_DEFINED & !ENTRY_READ_ONLY);
        self
    }
}

/// The I/O APIC of a machine; shared by the guest's CPUs and the devices on its pins.
pub struct Ioapic {
    state: Mutex<IoapicState>,
    irq_routes: Arc<dyn IrqRoutes>,
}

impl Ioapic {
    /// An I/O APIC in the given state, which sends its messages by `irq_routes`.
    pub fn new(irq_routes: Arc<dyn IrqRoutes>, state: IoapicState) -> Self {
        Self {
            state: Mutex::new(state.within_registers()),
            irq_routes,
        }
    }

    /// The present state.
    pub fn save(&self) -> IoapicState {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Puts the I/O APIC into `state`.
    pub fn restore(&self, state: IoapicState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state.within_registers();
    }

    /// Raises an edge on `pin`.
    pub fn pulse(&self, pin: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.pending |= 1 << pin;
        self.deliver(&mut state, pin);
    }

    fn deliver(&self, state: &mut IoapicState, pin: usize) {
        let entry = state.entries[pin];
        if entry & ENTRY_MASKED != 0 || state.pending & 1 << pin == 0 {
            return;
        }
        state.pending &= !(1 << pin);
        if let Err(error) = self.irq_routes.signal(message_of(entry)) {
            tracing::warn!(pin, %error, "the I/O APIC could not raise an interrupt");
        }
    }

    fn read_register(state: &IoapicState) -> u32 {
        match state.select {
            REG_ID | REG_ARBITRATION => state.id,
            REG_VERSION => VERSION,
            register => match entry_index(register) {
                Some((pin, false)) => state.entries[pin] as u32,
                Some((pin, true)) => (state.entries[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&self, state: &mut IoapicState, value: u32) {
        if state.select == REG_ID {
            state.id = value & ID_BITS;
            return;
        }
        let Some((pin, high)) = entry_index(state.select) else {
            return;
        };
        let old = state.entries[pin];
        let new = if high {
            old & 0xFFFF_FFFF | u64::from(value) << 32
        } else {
            old & 0xFFFF_FFFF_0000_0000 | u64::from(value)
        };
        state.entries[pin] = new & ENTRY_DEFINED & !ENTRY_READ_ONLY;
        self.deliver(state, pin);
    }
}

/// The pin of a redirection register, and whether it is the upper half.
fn entry_index(register: u8) -> Option<(usize, bool)> {
    let index = usize::from(register.checked_sub(REG_REDIRECTION)?);
    (index / 2 < PIN_COUNT).then_some((index / 2, index % 2 == 1))
}

/// The message that a redirection entry stands for: destination in address bits 12 to 19,
/// destination mode in bit 2; vector and delivery mode as they are.
fn message_of(entry: u64) -> MsiMessage {
    let destination = entry >> 56;
    let logical = entry >> 11 & 1;
    MsiMessage {
        address: 0xFEE0_0000 | destination << 12 | logical << 2,
        data: (entry & 0x7FF) as u32 | (entry as u32 & 1 << 15),
    }
}

impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match offset {
            IOREGSEL => u32::from(state.select),
            IOWIN => Self::read_register(&state),
            _ => 0,
        };
        crate::bus::fill(data, &value.to_le_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        let len = data.len().min(4);
        value[..len].copy_from_slice(&data[..len]);
        let value = u32::from_le_bytes(value);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            IOREGSEL => state.select = value as u8,
            IOWIN => self.write_register(&mut state, value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::RecordingIrqRoutes;

    fn program(ioapic: &Ioapic, register: u8, value: u32) {
        ioapic.write(IOREGSEL, &[register]);
        ioapic.write(IOWIN, &value.to_le_bytes());
    }

    fn ioapic() -> (Ioapic, Arc<RecordingIrqRoutes>) {
        let irq_routes = Arc::new(RecordingIrqRoutes::default());
        (
            Ioapic::new(irq_routes.clone(), IoapicState::fresh()),
            irq_routes,
        )
    }

    #[test]
    fn a_pulse_becomes_the_message_of_its_entry() {
        let (ioapic, irq_routes) = ioapic();
        program(&ioapic, 0x10 + 2 * 4 + 1, 0x0300_0000);
        program(&ioapic, 0x10 + 2 * 4, 0x0000_0041);
        ioapic.pulse(4);
        let sent = irq_routes.signalled.lock().unwrap().clone();
        assert_eq!(
            sent,
            [MsiMessage {
                address: 0xFEE0_3000,
                data: 0x41
            }]
        );
    }

    #[test]
    fn a_pulse_while_masked_waits_and_comes_once() {
        let (ioapic, irq_routes) = ioapic();
        ioapic.pulse(4);
        ioapic.pulse(4);
        assert!(irq_routes.signalled.lock().unwrap().is_empty());
        program(&ioapic, 0x10 + 2 * 4, 0x41);
        program(&ioapic, 0x10 + 2 * 4, 0x41);
        assert_eq!(irq_routes.signalled.lock().unwrap().len(), 1);
    }

    #[test]
    fn the_state_comes_back_whole() {
        let (ioapic, irq_routes) = ioapic();
        program(&ioapic, 0x10 + 2 * 9, 0x55);
        ioapic.pulse(7);
        let copy = Ioapic::new(irq_routes, ioapic.save());
        assert_eq!(copy.save(), ioapic.save());
    }

    #[test]
    fn a_saved_state_has_no_bits_that_the_registers_lack() {
        let (_, irq_routes) = ioapic();
        let hostile = IoapicState {
            id: u32::MAX,
            select: 0xFF,
            entries: [u64::MAX; PIN_COUNT],
            pending: u32::MAX,
        };
        let ioapic = Ioapic::new(irq_routes, hostile.clone());
        let built = ioapic.save();
        ioapic.restore(hostile);
        assert_eq!(ioapic.save(), built);
        assert_eq!((built.id, built.pending), (0x0F00_0000, 0x00FF_FFFF));
        assert_eq!(built.entries, [0xFF00_0000_0001_AFFF; PIN_COUNT]);
    }

    #[test]
    fn registers_beyond_the_last_pin_are_empty() {
        let (ioapic, _) = ioapic();
        for register in [0x10 + 2 * 24, 0xFF, 0x03] {
            program(&ioapic, register, u32::MAX);
            let mut data = [0xAA; 4];
            ioapic.read(IOWIN, &mut data);
            assert_eq!(data, [0; 4], "register {register:#x}");
        }
    }
}
