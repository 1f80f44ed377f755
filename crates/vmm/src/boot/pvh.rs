//! The PVH start info.
//!
//! Source: Xen `xen/include/public/arch-x86/hvm/start_info.h`, version 1.

use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::layout::{CMDLINE, MODULE_LIST, MemoryMap, PVH_MEMORY_MAP, START_INFO};
use super::{BootError, Initrd};
use crate::virtio::GuestRam;

const MAGIC: u32 = 0x336E_C578;
const VERSION: u32 = 1;

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Module {
    paddr: u64,
    size: u64,
    cmdline_paddr: u64,
    reserved: u64,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct MapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

// SAFETY: `repr(C)`, only integers, no padding (fields are ordered so that each is naturally
// aligned), so every bit pattern is valid and every byte initialised.
unsafe impl ByteValued for StartInfo {}
// SAFETY: as for `StartInfo`.
unsafe impl ByteValued for Module {}
// SAFETY: as for `StartInfo`.
unsafe impl ByteValued for MapEntry {}

pub(super) fn write_start_info(
    ram: &GuestRam,
    map: &MemoryMap,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), BootError> {
    let entry_size = size_of::<MapEntry>() as u64;
    for (index, &(addr, size, kind)) in (0u64..).zip(&map.0) {
        let entry = MapEntry {
            addr,
            size,
            kind: kind as u32,
            reserved: 0,
        };
        let at = GuestAddress(PVH_MEMORY_MAP + index * entry_size);
        ram.write_obj(entry, at).map_err(BootError::Write)?;
    }
    if let Some(Initrd { start, size }) = initrd {
        let module = Module {
            paddr: start,
            size,
            ..Default::default()
        };
        ram.write_obj(module, GuestAddress(MODULE_LIST))
            .map_err(BootError::Write)?;
    }
    let info = StartInfo {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: MODULE_LIST,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.0.len() as u32,
        ..Default::default()
    };
    ram.write_obj(info, GuestAddress(START_INFO))
        .map_err(BootError::Write)
}
