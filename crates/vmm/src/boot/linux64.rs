//! Linux's 64-bit boot protocol: boot parameters, page tables, entry point.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::KernelLoaderResult;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{BOOT_PARAMS, CMDLINE, MemoryMap, PAGE_TABLES};
use super::{BootError, Initrd};
use crate::virtio::GuestRam;

/// The offset of the magic number `HdrS` in a bzImage.
pub(super) const HEADER_MAGIC_OFFSET: u64 = 0x202;
/// The offset of the 64-bit entry point from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
/// `XLF_KERNEL_64` in `xloadflags`: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// The first protocol version with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020C;
/// The type of boot loaders without a number of their own ("undefined").
const LOADER_UNDEFINED: u8 = 0xFF;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

/// The end of what the kernel occupies until it has read its memory map.
pub(super) fn memory_needed_until(kernel: &KernelLoaderResult) -> u64 {
    let unpacked = kernel.setup_header.map_or(0, |header| {
        // The decompressor works from its preferred address upwards.
        header
            .pref_address
            .saturating_add(u64::from(header.init_size))
    });
    kernel.kernel_end.max(unpacked)
}

pub(super) fn entry_point(kernel: &KernelLoaderResult) -> Result<u64, BootError> {
    match kernel.setup_header {
        // An ELF kernel's entry point is the same code.
        None => Ok(kernel.kernel_load.0),
        Some(header)
            if header.version >= PROTOCOL_2_12 && header.xloadflags & XLF_KERNEL_64 != 0 =>
        {
            Ok(kernel.kernel_load.0 + ENTRY_64)
        }
        Some(_) => Err(BootError::NoEntry),
    }
}

pub(super) fn write_boot_params(
    ram: &GuestRam,
    map: &MemoryMap,
    kernel: &KernelLoaderResult,
    initrd: Option<Initrd>,
    cmdline_len: u32,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut params = boot_params::default();
    if let Some(header) = kernel.setup_header {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = 0xAA55;
        params.hdr.header = u32::from_le_bytes(*b"HdrS");
        params.hdr.kernel_alignment = 0x20_0000;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len;
    if let Some(Initrd { start, size }) = initrd {
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    params.acpi_rsdp_addr = rsdp;
    for (slot, &(addr, size, kind)) in params.e820_table.iter_mut().zip(&map.0) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: kind as u32,
        };
    }
    params.e820_entries = map.0.len() as u8;
    ram.write_obj(params, GuestAddress(BOOT_PARAMS))
        .map_err(BootError::Write)
}

/// Maps the first GiB one to one with pages of 2 MiB: PML4, PDPT and one page directory.
pub(super) fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    let (pdpt, directory) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    let write = |value: u64, at: u64| {
        ram.write_obj(value, GuestAddress(at))
            .map_err(BootError::Write)
    };
    write(pdpt | PAGE_PRESENT_WRITABLE, PAGE_TABLES)?;
    write(directory | PAGE_PRESENT_WRITABLE, pdpt)?;
    for index in 0..512 {
        write(
            index << 21 | PAGE_PRESENT_WRITABLE | PAGE_LARGE,
            directory + index * 8,
        )?;
    }
    Ok(())
}
