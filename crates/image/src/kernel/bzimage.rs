//! The bzImage container: finds and decompresses its `vmlinux`.
//!
//! Follows `Documentation/arch/x86/boot.rst` of Linux (setup header, protocol 2.08 and later). The header comes from
//! a file that may be truncated or hostile: every number in it is checked against the file before use, and the
//! output is bounded before anything is decompressed.

use super::elf::Elf;
use crate::decompress::{BoundedError, Compression, read_bounded};

const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// The first version of the protocol whose header has the payload's position.
const PROTOCOL_WITH_PAYLOAD: u16 = 0x0208;
const SECTOR: usize = 512;
/// The most bytes from the start of a file that [`is_bzimage`] and [`version`] need.
pub(super) const HEAD: usize = 64 * SECTOR + SECTOR;

fn bytes_at<const N: usize>(image: &[u8], at: usize) -> Result<[u8; N], String> {
    image
        .get(at..at + N)
        .and_then(|slice| slice.try_into().ok())
        .ok_or_else(|| {
            format!(
                "it has {} bytes and ends inside its setup header",
                image.len()
            )
        })
}

/// True if these first bytes of a file are a Linux boot image's.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(BOOT_FLAG..BOOT_FLAG + 2) == Some(&[0x55, 0xaa])
        && head.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

/// The kernel's version text, such as `6.12.1 (builder@host) #1 SMP`.
pub(super) fn version(head: &[u8]) -> Option<String> {
    let at = usize::from(u16::from_le_bytes(bytes_at(head, KERNEL_VERSION).ok()?)) + SECTOR;
    let text = head.get(at..)?;
    let text = &text[..text.iter().take(256).position(|&b| b == 0)?];
    let text = std::str::from_utf8(text).ok()?;
    (!text.is_empty() && text.chars().all(|c| !c.is_control())).then(|| text.to_owned())
}

/// The compressed payload's bytes.
fn payload(image: &[u8]) -> Result<&[u8], String> {
    if !is_bzimage(image) {
        return Err("it has no Linux setup header".to_owned());
    }
    let protocol = u16::from_le_bytes(bytes_at(image, VERSION)?);
    if protocol < PROTOCOL_WITH_PAYLOAD {
        return Err(format!(
            "its boot protocol {}.{:02} is older than 2.08 (Linux 2.6.26)",
            protocol >> 8,
            protocol & 0xff
        ));
    }
    // Zero means four, for compatibility with very old boot loaders.
    let sectors = match bytes_at::<1>(image, SETUP_SECTS)?[0] {
        0 => 4,
        n => usize::from(n),
    };
    let offset = u32::from_le_bytes(bytes_at(image, PAYLOAD_OFFSET)?) as usize;
    let length = u32::from_le_bytes(bytes_at(image, PAYLOAD_LENGTH)?) as usize;
    let from = (sectors + 1) * SECTOR + offset;
    let to = from + length;
    image.get(from..to).ok_or_else(|| {
        format!("its payload lies at {from:#x} to {to:#x}, but the file has {:#x} bytes: it is truncated", image.len())
    })
}

/// The physical address behind what the kernel takes up until it has read its memory map: the decompressor works from
/// its preferred address upwards. Needs only [`HEAD`] bytes.
pub(super) fn load_end(head: &[u8]) -> Result<u64, String> {
    let preferred = u64::from_le_bytes(bytes_at(head, PREF_ADDRESS)?);
    let size = u32::from_le_bytes(bytes_at(head, INIT_SIZE)?);
    preferred
        .checked_add(size.into())
        .ok_or_else(|| "its preferred address is beyond all memory".to_owned())
}

/// The ELF `vmlinux` inside a bzImage, which may have at most `limit` bytes.
///
/// # Errors
/// A sentence that completes "is not a kernel that can be booted: …".
pub(super) fn extract(image: &[u8], limit: u64) -> Result<Vec<u8>, String> {
    let payload = payload(image)?;
    // The last word is the length of the decompressed data: gzip's own, or one that the kernel's build appends.
    let Some((packed, size)) = payload.split_last_chunk::<4>() else {
        return Err(format!("its payload has only {} bytes", payload.len()));
    };
    let promised = u64::from(u32::from_le_bytes(*size));
    if promised > limit {
        return Err(format!(
            "it would decompress to {promised} bytes; at most {limit} are accepted"
        ));
    }
    let Some(compression) = Compression::detect(packed) else {
        let head = &packed[..packed.len().min(4)];
        let known = match head {
            [0x89, b'L', b'Z', b'O'] => "LZO",
            [b'B', b'Z', b'h', _] => "bzip2",
            _ => {
                return Err(format!(
                    "its payload has an unknown format (it starts with {head:02x?})"
                ));
            }
        };
        return Err(format!(
            "its payload is {known}-compressed, which is not supported: \
             build the kernel with CONFIG_KERNEL_ZSTD, or pass its uncompressed vmlinux"
        ));
    };
    let stream = if compression == Compression::Gzip {
        payload
    } else {
        packed
    };
    let vmlinux = compression
        .reader(stream)
        .map_err(BoundedError::Io)
        .and_then(|reader| read_bounded(reader, promised))
        .map_err(|e| match e {
            BoundedError::TooLong => {
                format!("its payload decompresses to more than the promised {promised} bytes")
            }
            BoundedError::Io(e) => format!("its {compression:?} payload is damaged: {e}"),
        })?;
    if vmlinux.len() as u64 != promised {
        return Err(format!(
            "its payload decompresses to {} bytes where {promised} are promised",
            vmlinux.len()
        ));
    }
    Elf::parse(&vmlinux).map_err(|e| format!("its payload is not a vmlinux: {e}"))?;
    Ok(vmlinux)
}

#[cfg(test)]
pub(super) mod testing {
    /// A bzImage of two setup sectors around a payload that already carries its length word.
    pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512];
        image[0x1f1] = 2;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x20e..0x210].copy_from_slice(&0x200u16.to_le_bytes());
        image[0x400..0x410].copy_from_slice(b"6.12.0 (test) #1");
        // Some decompressor code comes first in a real one.
        image[0x248..0x24c].copy_from_slice(&32u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(&[0x90; 32]);
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0; 64]);
        image
    }
}
