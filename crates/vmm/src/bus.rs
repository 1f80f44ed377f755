//! The buses that dispatch a guest's port and memory-mapped accesses to the device at their
//! address.
//!
//! A bus is fixed once the machine is assembled, so vCPU threads read it without a lock. PCI BARs,
//! which can move, are dispatched by the PCI bus behind one fixed window.

use std::sync::Arc;

/// A device that answers a range of addresses. Offsets count from the start of the range. The guest
/// chooses the size and offset of an access, so a device must handle all of them.
pub trait BusDevice: Send + Sync {
    /// Fills `data` from `offset`. Bytes that are not written keep the value that the bus put there
    /// (all ones).
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Handles a write of the guest.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Range {
    start: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// A set of ranges that do not overlap, ordered by address.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Puts `device` at `start`, for `size` bytes.
    ///
    /// # Panics
    /// Panics when the range overlaps another, which is a bug of the VMM and not a mistake of the
    /// guest.
    pub fn insert(&mut self, start: u64, size: u64, device: Arc<dyn BusDevice>) {
        let at = self.ranges.partition_point(|range| range.start < start);
        let free_below = at == 0 || self.ranges[at - 1].start + self.ranges[at - 1].size <= start;
        let free_above = self
            .ranges
            .get(at)
            .is_none_or(|next| start + size <= next.start);
        assert!(free_below && free_above, "bus ranges overlap at {start:#x}");
        self.ranges.insert(
            at,
            Range {
                start,
                size,
                device,
            },
        );
    }

    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(at.checked_sub(1)?)?;
        let offset = address - range.start;
        let end = offset.checked_add(len as u64)?;
        (end <= range.size).then_some((range.device.as_ref(), offset))
    }

    /// Handles a read. Addresses without a device read as all ones, as on a PC.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// Handles a write. Writes to addresses without a device are ignored, as on a PC.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

/// Copies as much of `value` as `data` takes and zeroes the rest, for a register that is narrower
/// or wider than the access.
pub(crate) fn fill(data: &mut [u8], value: &[u8]) {
    let len = data.len().min(value.len());
    data[..len].copy_from_slice(&value[..len]);
    data[len..].fill(0);
}

/// Reads `data.len()` bytes at `offset` of a register file; bytes past its end read as zero.
pub(crate) fn read_at(registers: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(registers.len());
    fill(data, &registers[start..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Echo(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    fn bus() -> (Bus, Arc<Echo>) {
        let echo = Arc::new(Echo(Mutex::default()));
        let mut bus = Bus::default();
        bus.insert(0x2000, 0x10, echo.clone());
        bus.insert(0x1000, 0x10, echo.clone());
        (bus, echo)
    }

    #[test]
    fn accesses_reach_their_range_with_their_offset() {
        let (bus, echo) = bus();
        let mut data = [0; 4];
        bus.read(0x1004, &mut data);
        assert_eq!(data, [4; 4]);
        bus.write(0x200F, &[1]);
        assert_eq!(*echo.0.lock().unwrap(), [(0xF, 1)]);
    }

    #[test]
    fn accesses_outside_or_across_a_range_read_as_ones_and_write_nothing() {
        let (bus, echo) = bus();
        for (address, len) in [(0xFFF, 1), (0x1010, 4), (0x100D, 4), (u64::MAX, 8), (0, 1)] {
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            assert!(data.iter().all(|&byte| byte == 0xFF), "{address:#x}");
            bus.write(address, &data);
        }
        assert!(echo.0.lock().unwrap().is_empty());
    }
}
