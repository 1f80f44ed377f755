//! Direct boot of Linux: puts the kernel, its initrd, its command line and the description of the
//! machine into RAM, and returns the registers with which the first CPU starts. No firmware runs.
//!
//! An ELF `vmlinux` with a Xen note is entered by the PVH protocol ([`pvh`]), anything else by
//! Linux's 64-bit protocol ([`linux64`]). ACPI tables are written by `acpi`, and registers are set
//! by `vcpu`. KASLR is done by the decompressor, so only a bzImage has it.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst`; Xen `docs/misc/pvh.pandoc`.

mod layout;
mod linux64;
mod pvh;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile};

use crate::virtio::GuestRam;
pub use layout::{ACPI_TABLES, MemoryKind, MemoryMap, RESERVED_END, VMGENID_ADDRESS};

/// The longest command line that Linux takes on x86, its final zero included (bytes).
pub const CMDLINE_MAX: usize = 2048;

/// The reason for which a kernel could not be loaded into RAM.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file could not be read.
    #[error("cannot read the kernel: {0}")]
    ReadKernel(#[source] io::Error),
    /// The file is neither an ELF file nor a bzImage.
    #[error("the kernel is neither an ELF vmlinux nor a bzImage")]
    UnknownKernel,
    /// The loader refused the kernel.
    #[error("the kernel cannot be loaded: {0}")]
    LoadKernel(#[source] linux_loader::loader::Error),
    /// The kernel is for 32-bit CPUs or too old.
    #[error("the kernel has no 64-bit entry point (boot protocol 2.12 or newer is needed)")]
    NoEntry,
    /// The initrd could not be read.
    #[error("cannot read the initrd: {0}")]
    ReadInitrd(#[source] io::Error),
    /// The kernel and the initrd do not fit into RAM.
    #[error("RAM of {ram_mib} MiB is too small for the kernel and an initrd of {initrd_mib} MiB")]
    TooSmall {
        /// The size of RAM below 4 GiB.
        ram_mib: u64,
        /// The initrd's size.
        initrd_mib: u64,
    },
    /// The command line is too long or holds a zero byte.
    #[error("the kernel command line is {0} bytes long; Linux takes at most {max}", max = CMDLINE_MAX - 1)]
    Cmdline(usize),
    /// A structure of the boot protocol does not fit into RAM.
    #[error("cannot write the boot parameters: {0}")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// The way in which the first CPU is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, paging off; `ebx` points to the start info.
    Pvh {
        /// The entry point.
        rip: u64,
        /// The address of the start info.
        start_info: u64,
    },
    /// 64-bit mode with the first GiB mapped one to one; `rsi` points to the boot parameters.
    Linux64 {
        /// The entry point.
        rip: u64,
        /// The address of the boot parameters.
        boot_params: u64,
        /// The address of the top page table.
        page_tables: u64,
    },
}

/// The kernel to boot, with its parameters.
pub struct BootSource<'a> {
    /// An ELF `vmlinux` or a bzImage.
    pub kernel: &'a mut File,
    /// The initial RAM disk.
    pub initrd: Option<&'a mut File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The address of the ACPI root pointer.
    pub rsdp: u64,
}

/// The place of the initrd in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Initrd {
    start: u64,
    size: u64,
}

/// Loads all parts into `ram` and returns how to start the first CPU.
pub fn load(ram: &GuestRam, source: BootSource<'_>) -> Result<Entry, BootError> {
    let kernel = load_kernel(ram, source.kernel)?;
    let initrd = match source.initrd {
        Some(file) => Some(load_initrd(ram, file, &kernel)?),
        None => None,
    };
    write_cmdline(ram, source.cmdline)?;
    let map = MemoryMap::of(ram);
    match kernel.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            pvh::write_start_info(ram, &map, initrd, source.rsdp)?;
            Ok(Entry::Pvh {
                rip: entry.0,
                start_info: layout::START_INFO,
            })
        }
        _ => {
            let cmdline_len = source.cmdline.len() as u32;
            linux64::write_boot_params(ram, &map, &kernel, initrd, cmdline_len, source.rsdp)?;
            linux64::write_page_tables(ram)?;
            Ok(Entry::Linux64 {
                rip: linux64::entry_point(&kernel)?,
                boot_params: layout::BOOT_PARAMS,
                page_tables: layout::PAGE_TABLES,
            })
        }
    }
}

fn load_kernel(ram: &GuestRam, file: &mut File) -> Result<KernelLoaderResult, BootError> {
    let mut magic = [0; 4];
    file.rewind()
        .and_then(|()| file.read_exact(&mut magic))
        .map_err(BootError::ReadKernel)?;
    let high_memory = Some(GuestAddress(RESERVED_END));
    if &magic == b"\x7FELF" {
        return Elf::load(ram, None, file, high_memory).map_err(BootError::LoadKernel);
    }
    file.seek(SeekFrom::Start(linux64::HEADER_MAGIC_OFFSET))
        .map_err(BootError::ReadKernel)?;
    match file.read_exact(&mut magic) {
        Ok(()) if &magic == b"HdrS" => {
            BzImage::load(ram, None, file, high_memory).map_err(BootError::LoadKernel)
        }
        _ => Err(BootError::UnknownKernel),
    }
}

/// Loads the initrd at the highest address that the kernel can reach, away from the kernel itself.
fn load_initrd(
    ram: &GuestRam,
    file: &mut File,
    kernel: &KernelLoaderResult,
) -> Result<Initrd, BootError> {
    let size = file.seek(SeekFrom::End(0)).map_err(BootError::ReadInitrd)?;
    file.rewind().map_err(BootError::ReadInitrd)?;
    let low_ram = ram
        .iter()
        .next()
        .map_or(0, |region| region.start_addr().0 + region.len());
    let limit = kernel.setup_header.map_or(low_ram, |header| {
        low_ram.min(u64::from(header.initrd_addr_max).saturating_add(1))
    });
    let too_small = || BootError::TooSmall {
        ram_mib: low_ram >> 20,
        initrd_mib: size.div_ceil(1 << 20),
    };
    let start = limit.checked_sub(size).ok_or_else(too_small)? & !0xFFF;
    if start < linux64::memory_needed_until(kernel) {
        return Err(too_small());
    }
    read_into(ram, file, start, size).map_err(BootError::ReadInitrd)?;
    Ok(Initrd { start, size })
}

fn read_into(ram: &GuestRam, file: &mut File, start: u64, size: u64) -> io::Result<()> {
    let slice = ram
        .get_slice(GuestAddress(start), size as usize)
        .map_err(io::Error::other)?;
    file.read_exact_volatile(&mut { slice })
        .map_err(io::Error::other)
}

fn write_cmdline(ram: &GuestRam, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_MAX || cmdline.contains('\0') {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    ram.write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(BootError::Write)
}

#[cfg(test)]
mod tests;
