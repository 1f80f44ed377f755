//! The PCI bus: its slots, and the two windows through which the guest reaches them.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{BarRange, ConfigSpace, ECAM_SIZE, Identity, MMIO32_BASE, PciDevice, SLOT_COUNT};
use crate::bus::BusDevice;

type SharedDevice = Arc<Mutex<dyn PciDevice>>;

/// The device and the BAR at an address of the memory window.
struct Placed {
    bar: BarRange,
    device: SharedDevice,
}

/// A PCI bus with up to 32 single-function devices.
///
/// Locks: a device's own lock may be held when `placed` is taken, never the other way round.
pub struct PciBus {
    slots: RwLock<Vec<Option<SharedDevice>>>,
    placed: RwLock<Vec<(usize, Placed)>>,
}

impl PciBus {
    /// A bus with its host bridge in slot 0.
    pub fn new() -> Arc<Self> {
        let mut slots: Vec<Option<SharedDevice>> = vec![None; SLOT_COUNT];
        slots[0] = Some(Arc::new(Mutex::new(HostBridge::new())));
        Arc::new(Self {
            slots: RwLock::new(slots),
            placed: RwLock::default(),
        })
    }

    /// Puts `device` into `slot`. This may be called while the guest runs, which is meant for
    /// hotplug.
    ///
    /// # Panics
    /// Panics when the slot is taken or beyond the bus, because the VMM itself assigns slots.
    pub fn insert(&self, slot: usize, device: SharedDevice) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        assert!(slots[slot].is_none(), "PCI slot {slot} is taken");
        slots[slot] = Some(Arc::clone(&device));
        drop(slots);
        let bars = device.lock().unwrap_or_else(PoisonError::into_inner).bars();
        self.place(slot, &device, &bars);
    }

    fn place(&self, slot: usize, device: &SharedDevice, bars: &[BarRange]) {
        let mut placed = self.placed.write().unwrap_or_else(PoisonError::into_inner);
        placed.retain(|(other, _)| *other != slot);
        placed.extend(bars.iter().map(|&bar| {
            (
                slot,
                Placed {
                    bar,
                    device: Arc::clone(device),
                },
            )
        }));
    }

    fn device(&self, slot: usize) -> Option<SharedDevice> {
        self.slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(slot)?
            .clone()
    }

    /// Finds the device of an ECAM offset: bus in bits 20 to 27 (always 0 here), slot in 15 to 19,
    /// function in 12 to 14, register below.
    fn at_config_offset(&self, offset: u64, len: usize) -> Option<(usize, SharedDevice, u16)> {
        let register = (offset & 0xFFF) as u16;
        let function = offset >> 12 & 7;
        let slot = (offset >> 15) as usize;
        if function != 0 || usize::from(register) + len > 4096 {
            return None;
        }
        Some((slot, self.device(slot)?, register))
    }

    fn at_address(&self, address: u64, len: usize) -> Option<(SharedDevice, u8, u64)> {
        let placed = self.placed.read().unwrap_or_else(PoisonError::into_inner);
        placed.iter().find_map(|(_, place)| {
            let offset = place.bar.offset_of(address, len)?;
            Some((Arc::clone(&place.device), place.bar.index, offset))
        })
    }
}

/// The ECAM window onto a bus.
pub struct EcamWindow(pub Arc<PciBus>);

impl BusDevice for EcamWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        debug_assert!(offset < ECAM_SIZE);
        if let Some((_, device, register)) = self.0.at_config_offset(offset, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .config_read(register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((slot, device, register)) = self.0.at_config_offset(offset, data.len()) else {
            return;
        };
        let mut locked = device.lock().unwrap_or_else(PoisonError::into_inner);
        let before = locked.bars();
        locked.config_write(register, data);
        let after = locked.bars();
        if before != after {
            self.0.place(slot, &device, &after);
        }
    }
}

/// The memory window onto a bus, from [`MMIO32_BASE`].
pub struct MmioWindow(pub Arc<PciBus>);

impl BusDevice for MmioWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((device, bar, at)) = self.0.at_address(MMIO32_BASE + offset, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .bar_read(bar, at, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, bar, at)) = self.0.at_address(MMIO32_BASE + offset, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .bar_write(bar, at, data);
        }
    }
}

/// The host bridge, by which the guest finds the bus as on a PC. It has no state.
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        // These are the generic host bridge ids of the vendor whose virtio devices are behind the
        // bridge.
        Self(ConfigSpace::new(Identity {
            vendor: 0x1B36,
            device: 0x0008,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
            class: 0x06_00_00,
            revision: 0,
        }))
    }
}

impl PciDevice for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn config_write(&mut self, _offset: u16, _data: &[u8]) {}
    fn bars(&self) -> Vec<BarRange> {
        Vec::new()
    }
    fn bar_read(&mut self, _index: u8, _offset: u64, _data: &mut [u8]) {}
    fn bar_write(&mut self, _index: u8, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch {
        config: ConfigSpace,
        memory: [u8; 16],
    }

    impl PciDevice for Scratch {
        fn config_read(&mut self, offset: u16, data: &mut [u8]) {
            self.config.read(offset, data);
        }
        fn config_write(&mut self, offset: u16, data: &[u8]) {
            self.config.write(offset, data);
        }
        fn bars(&self) -> Vec<BarRange> {
            self.config.bars()
        }
        fn bar_read(&mut self, _index: u8, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.memory[offset as usize..][..data.len()]);
        }
        fn bar_write(&mut self, _index: u8, offset: u64, data: &[u8]) {
            self.memory[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn bus_with_scratch() -> Arc<PciBus> {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            subsystem_vendor: 0,
            subsystem: 0,
            class: 0,
            revision: 0,
        };
        let mut config = ConfigSpace::new(identity);
        config.add_bar(0, 0xC000_0000, 16);
        let bus = PciBus::new();
        bus.insert(
            3,
            Arc::new(Mutex::new(Scratch {
                config,
                memory: [0; 16],
            })),
        );
        bus
    }

    fn read<const N: usize>(window: &dyn BusDevice, offset: u64) -> [u8; N] {
        let mut data = [0xFF; N];
        window.read(offset, &mut data);
        data
    }

    #[test]
    fn slots_answer_and_empty_ones_read_as_ones() {
        let ecam = EcamWindow(bus_with_scratch());
        assert_eq!(read(&ecam, 3 << 15), [0x34, 0x12, 0x78, 0x56]);
        assert_eq!(read(&ecam, 4 << 15), [0xFF; 4]);
        assert_eq!(read(&ecam, 3 << 15 | 1 << 12), [0xFF; 4], "function 1");
    }

    #[test]
    fn a_bar_answers_where_the_guest_moved_it_and_nowhere_else() {
        let bus = bus_with_scratch();
        let (ecam, mmio) = (EcamWindow(bus.clone()), MmioWindow(bus));
        mmio.write(0x4, &[7]);
        assert_eq!(read(&mmio, 0x4), [7]);
        ecam.write(3 << 15 | 0x10, &0xC000_1000_u32.to_le_bytes());
        assert_eq!(read(&mmio, 0x4), [0xFF]);
        assert_eq!(read(&mmio, 0x1004), [7]);
        ecam.write(3 << 15 | 0x4, &[0]);
        assert_eq!(read(&mmio, 0x1004), [0xFF]);
    }
}
