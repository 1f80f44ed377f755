//! The first 256 bytes of a function's configuration space: registers with a mask of what the
//! guest may write, BARs and the list of capabilities.

use serde::{Deserialize, Serialize};

use crate::bus;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
/// The bits of COMMAND that the guest may change: memory decoding, bus mastering, INTx disable.
const COMMAND_WRITABLE: [u8; 2] = [0b0000_0110, 0b0000_0100];
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR0: usize = 0x10;
const BAR_COUNT: usize = 6;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
const FIRST_CAPABILITY: usize = 0x40;
/// The bytes of registers that the space has. Beyond them everything reads as zero.
pub const CONFIG_SIZE: usize = 256;

/// The identity of a function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The vendor id.
    pub vendor: u16,
    /// The device id.
    pub device: u16,
    /// The subsystem vendor id.
    pub subsystem_vendor: u16,
    /// The subsystem id.
    pub subsystem: u16,
    /// The class code: base class, subclass, programming interface from the top byte down.
    pub class: u32,
    /// The revision.
    pub revision: u8,
}

/// A BAR that answers now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// The number of the BAR, 0 to 5.
    pub index: u8,
    /// The guest-physical address of its first byte.
    pub address: u64,
    /// Its size in bytes, a power of two.
    pub size: u64,
}

impl BarRange {
    /// The offset of an access in this BAR, or `None` where the access does not lie wholly within
    /// it.
    pub fn offset_of(&self, address: u64, len: usize) -> Option<u64> {
        let offset = address.checked_sub(self.address)?;
        (offset.checked_add(len as u64)? <= self.size).then_some(offset)
    }
}

/// The saved state of a configuration space: its registers. Masks and sizes follow from the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    registers: Vec<u8>,
}

/// A function's configuration space.
pub struct ConfigSpace {
    registers: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bar_sizes: [u64; BAR_COUNT],
    next_capability: usize,
    /// The offset of the pointer to the next capability.
    last_link: usize,
}

impl ConfigSpace {
    /// A type 0 header (PCI 3.0, 6.1) with no BARs and no capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            registers: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            bar_sizes: [0; BAR_COUNT],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES_POINTER,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x09, &identity.class.to_le_bytes()[..3]);
        space.set(0x2C, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2E, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE);
        space.writable[INTERRUPT_LINE] = 0xFF;
        space
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.registers[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds a 32-bit memory BAR that starts at `address` (as a firmware would have placed it).
    pub fn add_bar(&mut self, index: u8, address: u32, size: u32) {
        assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        let at = BAR0 + usize::from(index) * 4;
        self.set(at, &address.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self.bar_sizes[usize::from(index)] = u64::from(size);
        // Decoding is on from the start, as firmware would leave it.
        self.registers[COMMAND] |= COMMAND_MEMORY;
    }

    /// Appends a capability with its `body` (what follows the id and the link); returns the offset
    /// of its id.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(
            end <= CONFIG_SIZE,
            "the capabilities of a device fit its configuration space"
        );
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.registers[self.last_link] = at as u8;
        self.registers[STATUS] |= STATUS_CAPABILITIES;
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        at
    }

    /// Lets the guest write the bits of `mask` at `offset`.
    pub fn allow_writes(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Reads registers.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        bus::read_at(&self.registers, u64::from(offset), data);
    }

    /// Writes the bits that the masks allow. Other bits are ignored, as on hardware.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        for (at, &value) in (start..CONFIG_SIZE).zip(data) {
            let mask = self.writable[at];
            self.registers[at] = self.registers[at] & !mask | value & mask;
        }
    }

    /// Whether the function answers memory accesses.
    pub fn memory_enabled(&self) -> bool {
        self.registers[COMMAND] & COMMAND_MEMORY != 0
    }

    /// The BARs that answer now.
    pub fn bars(&self) -> Vec<BarRange> {
        if !self.memory_enabled() {
            return Vec::new();
        }
        let sized = self
            .bar_sizes
            .iter()
            .enumerate()
            .filter(|(_, size)| **size != 0);
        sized
            .map(|(index, &size)| {
                let at = BAR0 + index * 4;
                let mut low = [0; 4];
                low.copy_from_slice(&self.registers[at..at + 4]);
                let address = u64::from(u32::from_le_bytes(low) & !0xF);
                BarRange {
                    index: index as u8,
                    address,
                    size,
                }
            })
            .collect()
    }

    /// Its registers, to be saved.
    pub fn save(&self) -> ConfigState {
        ConfigState {
            registers: self.registers.to_vec(),
        }
    }

    /// Restores the registers that the guest can write. All others must be the same as in the saved
    /// state, because the guest's drivers rely on them.
    pub fn restore(&mut self, state: &ConfigState) -> Result<(), String> {
        self.check(state)?;
        self.registers.copy_from_slice(&state.registers);
        Ok(())
    }

    /// Checks that a saved state differs from this function only in what a guest can write.
    pub fn check(&self, state: &ConfigState) -> Result<(), String> {
        if state.registers.len() != CONFIG_SIZE {
            return Err(format!(
                "configuration space of {} bytes",
                state.registers.len()
            ));
        }
        for (at, (&saved, &mine)) in state.registers.iter().zip(&self.registers).enumerate() {
            if (saved ^ mine) & !self.writable[at] != 0 {
                return Err(format!(
                    "configuration register {at:#x} was {saved:#04x} when saved and is {mine:#04x} in \
                     this machine"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1AF4,
            device: 0x1042,
            subsystem_vendor: 0x1AF4,
            subsystem: 2,
            class: 0x01_80_00,
            revision: 1,
        });
        space.add_bar(0, 0xC001_0000, 0x1_0000);
        space
    }

    fn read32(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_is_sized_and_moved_as_the_specification_says() {
        let mut space = space();
        assert_eq!(
            space.bars(),
            [BarRange {
                index: 0,
                address: 0xC001_0000,
                size: 0x1_0000
            }]
        );
        space.write(4, &[0, 0]);
        assert!(space.bars().is_empty());
        space.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(read32(&space, 0x10), 0xFFFF_0000);
        space.write(0x10, &0xC123_4567_u32.to_le_bytes());
        space.write(4, &[2, 0]);
        assert_eq!(space.bars()[0].address, 0xC123_0000);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[16, 1, 0]);
        let second = space.add_capability(0x11, &[0; 10]);
        assert_eq!(read32(&space, 0x34) as usize & 0xFF, first);
        assert_eq!(read32(&space, first as u16) >> 8 & 0xFF, second as u32);
        assert_eq!(read32(&space, second as u16) >> 8 & 0xFF, 0);
    }

    #[test]
    fn a_state_of_another_device_is_refused() {
        let mut other = ConfigSpace::new(Identity {
            vendor: 0x1AF4,
            device: 0x1041,
            subsystem_vendor: 0,
            subsystem: 0,
            class: 0,
            revision: 1,
        });
        assert!(
            other
                .restore(&space().save())
                .unwrap_err()
                .contains("register 0x2")
        );
    }

    proptest! {
        #[test]
        fn no_write_changes_what_is_fixed(offset in 0u16..4096, data in prop::collection::vec(any::<u8>(), 1..8)) {
            let mut changed = space();
            changed.write(offset, &data);
            let mut same = space();
            prop_assert!(same.restore(&changed.save()).is_ok());
        }
    }
}
