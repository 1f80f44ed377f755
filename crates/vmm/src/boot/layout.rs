//! The layout of the first megabyte, and the memory map that the guest is given.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::pci::{ECAM_BASE, ECAM_SIZE};
use crate::virtio::GuestRam;

/// PVH start info, its module list and its memory map.
pub(super) const START_INFO: u64 = 0x6000;
pub(super) const MODULE_LIST: u64 = 0x6040;
pub(super) const PVH_MEMORY_MAP: u64 = 0x6080;
/// The 64-bit protocol's boot parameters ("zero page").
pub(super) const BOOT_PARAMS: u64 = 0x7000;
/// Page tables for the 64-bit protocol: three pages.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Low memory that the guest may use ends here, as on a PC with an extended BIOS area.
const LOW_RAM_END: u64 = 0x9_FC00;
/// ACPI tables, in the range where a PC has its BIOS.
pub const ACPI_TABLES: u64 = 0xE_0000;
/// The virtual machine generation id, on a page of its own so that a fork touches only that.
pub const VMGENID_ADDRESS: u64 = 0xF_F000;
/// From here on all RAM is for the guest to use.
pub const RESERVED_END: u64 = 0x10_0000;

/// The kind of a range of the map. The numbers are those of e820 and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// The guest may use the range.
    Ram = 1,
    /// The guest must not allocate the range.
    Reserved = 2,
}

/// The memory map: start, size in bytes, kind.
pub struct MemoryMap(pub Vec<(u64, u64, MemoryKind)>);

impl MemoryMap {
    /// The memory map of a machine with this RAM.
    pub fn of(ram: &GuestRam) -> Self {
        let mut map = vec![
            (0, LOW_RAM_END, MemoryKind::Ram),
            (
                LOW_RAM_END,
                RESERVED_END - LOW_RAM_END,
                MemoryKind::Reserved,
            ),
        ];
        for region in ram.iter() {
            let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
            let start = start.max(RESERVED_END);
            if start < end {
                map.push((start, end - start, MemoryKind::Ram));
            }
        }
        // Linux trusts the ECAM window only where the map reserves it.
        map.push((ECAM_BASE, ECAM_SIZE, MemoryKind::Reserved));
        map.sort_by_key(|(start, ..)| *start);
        Self(map)
    }
}
