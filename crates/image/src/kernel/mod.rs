//! Kernels: distinguishes bzImage and `vmlinux` files, and keeps extracted `vmlinux` files in a
//! cache.
//!
//! A guest that starts from an ELF `vmlinux` skips its own decompression, which costs more than all the rest of the
//! early boot. The file is made once per kernel and kept under the hash of the bzImage it came from.
//!
//! The VMM loads kernels into guest memory; this module does not.

mod bzimage;
mod cache;
mod elf;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::path::Path;

pub use cache::{CachedKernel, KernelCache};
pub(crate) use elf::Elf;
#[cfg(test)]
pub(crate) use elf::testing;

use crate::{ImageError, Result};

/// The largest kernel file that is accepted, compressed or not. Distribution kernels have 60 to 100 MiB.
pub const MAX_KERNEL_BYTES: u64 = 1 << 30;

/// The container a kernel comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelFormat {
    /// Linux's self-extracting boot image (`vmlinuz`).
    BzImage,
    /// An uncompressed ELF executable (`vmlinux`).
    Elf,
}

/// The facts in a kernel's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelInfo {
    /// Its container.
    pub format: KernelFormat,
    /// The version text in a bzImage's header; an ELF file has none in a fixed place.
    pub version: Option<String>,
}

/// Recognises a kernel by its first bytes, not by its name.
///
/// # Errors
/// If the file cannot be read, or is neither a bzImage nor an ELF file.
pub fn inspect(path: &Path) -> Result<KernelInfo> {
    recognise(&read_head(path)?).map_err(|reason| ImageError::Kernel {
        path: path.to_owned(),
        reason,
    })
}

fn read_head(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(ImageError::io("open the kernel", path))?;
    let mut head = Vec::new();
    file.take(bzimage::HEAD as u64)
        .read_to_end(&mut head)
        .map_err(ImageError::io("read the kernel", path))?;
    Ok(head)
}

/// The memory that Linux needs to start, besides itself and its initrd: page tables, page
/// descriptors, slabs, buffers.
const WORKING_MEMORY: u64 = 16 << 20;

/// The RAM that a guest of this kernel needs at the least, in bytes from address 0 on: the kernel where it is loaded,
/// `initrd` bytes of an initial RAM disk and as many unpacked, and what Linux needs to come up.
///
/// # Errors
/// If the file cannot be read, or is neither a bzImage nor an ELF file.
pub fn least_memory(path: &Path, initrd: u64) -> Result<u64> {
    let head = read_head(path)?;
    let end = recognise(&head).and_then(|info| match info.format {
        KernelFormat::BzImage => bzimage::load_end(&head),
        KernelFormat::Elf => Elf::parse(&head)?.load_end(),
    });
    let end = end.map_err(|reason| ImageError::Kernel {
        path: path.to_owned(),
        reason,
    })?;
    Ok(end
        .saturating_add(initrd.saturating_mul(2))
        .saturating_add(WORKING_MEMORY))
}

fn recognise(head: &[u8]) -> Result<KernelInfo, String> {
    if bzimage::is_bzimage(head) {
        Ok(KernelInfo {
            format: KernelFormat::BzImage,
            version: bzimage::version(head),
        })
    } else if Elf::is_magic(head) {
        Elf::parse(head)?;
        Ok(KernelInfo {
            format: KernelFormat::Elf,
            version: None,
        })
    } else {
        Err("it is neither a bzImage (vmlinuz) nor an ELF vmlinux".to_owned())
    }
}

/// Reads a whole kernel file, within [`MAX_KERNEL_BYTES`].
fn read_kernel(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(ImageError::io("open the kernel", path))?;
    let mut bytes = Vec::new();
    file.take(MAX_KERNEL_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(ImageError::io("read the kernel", path))?;
    if bytes.len() as u64 > MAX_KERNEL_BYTES {
        return Err(ImageError::Kernel {
            path: path.to_owned(),
            reason: format!("it has more than {MAX_KERNEL_BYTES} bytes"),
        });
    }
    Ok(bytes)
}

/// The `vmlinux` in these bytes of a kernel file, and what it tells about itself.
fn vmlinux_of(bytes: Vec<u8>) -> Result<(Vec<u8>, elf::Vmlinux), String> {
    let elf = match recognise(&bytes)?.format {
        KernelFormat::Elf => bytes,
        KernelFormat::BzImage => bzimage::extract(&bytes, MAX_KERNEL_BYTES)?,
    };
    let facts = Elf::parse(&elf)?.vmlinux()?;
    Ok((elf, facts))
}

/// Extracts the `vmlinux` from a kernel file without a cache; an ELF file is checked and returned as it is.
///
/// # Errors
/// [`ImageError::Kernel`] names what is wrong with a truncated or hostile file.
pub fn extract_vmlinux(path: &Path) -> Result<Vec<u8>> {
    vmlinux_of(read_kernel(path)?)
        .map(|(elf, _)| elf)
        .map_err(|reason| ImageError::Kernel {
            path: path.to_owned(),
            reason,
        })
}

/// Checks and decompresses a kernel from memory, for fuzzing.
///
/// # Errors
/// A sentence that says what is wrong.
#[doc(hidden)]
pub fn fuzz_vmlinux(bytes: &[u8], limit: u64) -> Result<Vec<u8>, String> {
    let elf = if bzimage::is_bzimage(bytes) {
        bzimage::extract(bytes, limit)?
    } else {
        bytes.to_vec()
    };
    Elf::parse(&elf)?.vmlinux()?;
    Ok(elf)
}
