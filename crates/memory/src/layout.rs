//! The layout of RAM in the guest's physical address space: below the 32-bit PCI hole and above it.
//!
//! Files that hold RAM (snapshots) use *RAM offsets*: the same bytes without the hole.

use vm_memory::GuestAddress;

/// RAM below 4 GiB ends here; PCI devices and interrupt controllers follow.
pub const PCI_HOLE_START: u64 = 0xC000_0000;
/// RAM above 4 GiB starts here.
pub const PCI_HOLE_END: u64 = 0x1_0000_0000;
/// The page size that all sizes are a multiple of, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// The layout of RAM of a given size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamLayout {
    size: u64,
}

/// A piece of RAM that is contiguous for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// The guest's address of the range.
    pub start: GuestAddress,
    /// The size of the range in bytes.
    pub size: u64,
    /// The RAM offset at which the range starts in a file.
    pub offset: u64,
}

impl RamLayout {
    /// RAM of `size` bytes; `None` unless that is a positive multiple of [`PAGE_SIZE`] that leaves
    /// the addresses above it representable.
    pub fn new(size: u64) -> Option<Self> {
        let valid = size > 0 && size.is_multiple_of(PAGE_SIZE) && size <= 1 << 46;
        valid.then_some(Self { size })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its one or two pieces, in order of address.
    pub fn ranges(&self) -> impl Iterator<Item = RamRange> {
        let low = self.size.min(PCI_HOLE_START);
        let high = self.size - low;
        let low = RamRange {
            start: GuestAddress(0),
            size: low,
            offset: 0,
        };
        let high = RamRange {
            start: GuestAddress(PCI_HOLE_END),
            size: high,
            offset: low.size,
        };
        [low, high].into_iter().filter(|range| range.size > 0)
    }

    /// The RAM offset of a guest address; `None` outside RAM.
    pub fn offset_of(&self, address: GuestAddress) -> Option<u64> {
        self.ranges().find_map(|range| {
            let within = address.0.checked_sub(range.start.0)?;
            (within < range.size).then_some(range.offset + within)
        })
    }

    /// The guest address of a RAM offset; `None` beyond RAM.
    pub fn address_of(&self, offset: u64) -> Option<GuestAddress> {
        self.ranges().find_map(|range| {
            let within = offset.checked_sub(range.offset)?;
            (within < range.size).then_some(GuestAddress(range.start.0 + within))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(size: u64) -> Vec<(u64, u64, u64)> {
        let layout = RamLayout::new(size).unwrap();
        layout
            .ranges()
            .map(|range| (range.start.0, range.size, range.offset))
            .collect()
    }

    #[test]
    fn ram_never_covers_the_pci_hole() {
        assert_eq!(ranges(1 << 30), [(0, 1 << 30, 0)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30, 0)]);
        assert_eq!(
            ranges(5 << 30),
            [(0, 3 << 30, 0), (4 << 30, 2 << 30, 3 << 30)]
        );
    }

    #[test]
    fn offsets_and_addresses_are_each_other_s_inverse() {
        let layout = RamLayout::new(5 << 30).unwrap();
        for offset in [0, (3 << 30) - 1, 3 << 30, (5 << 30) - 1] {
            let address = layout.address_of(offset).unwrap();
            assert_eq!(layout.offset_of(address), Some(offset));
        }
        assert_eq!(layout.address_of(5 << 30), None);
        assert_eq!(layout.offset_of(GuestAddress(PCI_HOLE_START)), None);
    }

    #[test]
    fn odd_sizes_are_refused() {
        for size in [0, 1, 4097, u64::MAX, 1 << 47] {
            assert_eq!(RamLayout::new(size), None, "{size}");
        }
    }
}
