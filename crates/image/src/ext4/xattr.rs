//! Extended attributes: in the inode if they fit, else in a block of their own.
//! (Linux `Documentation/filesystems/ext4/attributes.rst`)

use std::collections::BTreeMap;

use super::bytes::{low16, low32, put};
use super::checksum::crc;
use super::geometry::BLOCK_USIZE;

const MAGIC: u32 = 0xea02_0000;
/// The room for attributes in a 256-byte inode with 32 bytes of extra fields.
pub(super) const IN_INODE: usize = 96;
const BLOCK_HEADER: usize = 32;
const ENTRY_HEADER: usize = 16;
/// Name prefixes that are stored as a number. Access control lists come first: they are whole names.
const PREFIXES: [(&[u8], u8); 6] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
    (b"system.", 7),
];

/// The place of an inode's attributes.
#[derive(Debug)]
pub(super) enum Xattrs {
    None,
    Inode(Box<[u8; IN_INODE]>),
    /// A block, complete but for its checksum, which depends on its place: see [`seal`].
    Block(Vec<u8>),
}

struct Stored {
    index: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Stored {
    fn entry_len(&self) -> usize {
        (ENTRY_HEADER + self.name.len()).next_multiple_of(4)
    }

    fn value_len(&self) -> usize {
        self.value.len().next_multiple_of(4)
    }

    /// Rotates and adds name bytes, then the value's words. (`ext4_xattr_hash_entry`)
    fn hash(&self) -> u32 {
        let by_name = self
            .name
            .iter()
            .fold(0u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
        self.value.chunks(4).fold(by_name, |hash, part| {
            let mut word = [0; 4];
            word[..part.len()].copy_from_slice(part);
            hash.rotate_left(16) ^ u32::from_le_bytes(word)
        })
    }
}

/// Encodes attributes.
///
/// # Errors
/// A sentence that says which attribute cannot be stored.
pub(super) fn encode(attributes: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Xattrs, String> {
    if attributes.is_empty() {
        return Ok(Xattrs::None);
    }
    let mut stored = attributes
        .iter()
        .map(|(name, value)| store(name, value))
        .collect::<Result<Vec<_>, _>>()?;
    // The order that lookups in a block rely on.
    stored.sort_by(|a, b| (a.index, a.name.len(), &a.name).cmp(&(b.index, b.name.len(), &b.name)));
    let total: usize = stored
        .iter()
        .map(|s| s.entry_len() + s.value_len())
        .sum::<usize>()
        + 4;
    if total + 4 <= IN_INODE {
        let mut area = Box::new([0; IN_INODE]);
        put(&mut area[..], 0, MAGIC.to_le_bytes());
        fill(&mut area[4..], 0, &stored);
        return Ok(Xattrs::Inode(area));
    }
    if total + BLOCK_HEADER > BLOCK_USIZE {
        return Err(format!(
            "its extended attributes need {total} bytes; ext4 stores at most one block of them"
        ));
    }
    let mut block = vec![0; BLOCK_USIZE];
    put(&mut block, 0, MAGIC.to_le_bytes());
    put(&mut block, 4, 1u32.to_le_bytes());
    put(&mut block, 8, 1u32.to_le_bytes());
    let hash = stored
        .iter()
        .fold(0u32, |hash, s| hash.rotate_left(16) ^ s.hash());
    put(&mut block, 12, hash.to_le_bytes());
    fill(&mut block, BLOCK_HEADER, &stored);
    Ok(Xattrs::Block(block))
}

/// Writes the entries from `at` upwards and the values from the area's end downwards.
fn fill(area: &mut [u8], mut at: usize, stored: &[Stored]) {
    let mut end = area.len();
    for s in stored {
        let mut offset = 0;
        if !s.value.is_empty() {
            end -= s.value_len();
            area[end..end + s.value.len()].copy_from_slice(&s.value);
            offset = end;
        }
        area[at] = s.name.len() as u8;
        area[at + 1] = s.index;
        put(area, at + 2, low16(offset as u64));
        put(area, at + 8, low32(s.value.len() as u64));
        put(area, at + 12, s.hash().to_le_bytes());
        area[at + ENTRY_HEADER..at + ENTRY_HEADER + s.name.len()].copy_from_slice(&s.name);
        at += s.entry_len();
    }
}

/// Puts the checksum into an attribute block that will lie at this place.
pub(super) fn seal(block: &mut [u8], place: u64, seed: u32) {
    let checksum = crc(crc(seed, &place.to_le_bytes()), block);
    put(block, 16, checksum.to_le_bytes());
}

fn store(name: &[u8], value: &[u8]) -> Result<Stored, String> {
    let shown = String::from_utf8_lossy(name);
    let (prefix, index) = PREFIXES
        .iter()
        .find(|(prefix, _)| name.starts_with(prefix))
        .ok_or_else(|| {
            format!("its extended attribute {shown} has no namespace that ext4 knows")
        })?;
    let rest = name[prefix.len()..].to_vec();
    let is_acl = matches!(index, 2 | 3);
    if rest.len() > 255 || rest.is_empty() != is_acl {
        return Err(format!(
            "its extended attribute {shown} has an impossible name"
        ));
    }
    let value = if is_acl {
        disk_acl(value).ok_or_else(|| format!("its access control list {shown} is malformed"))?
    } else {
        value.to_vec()
    };
    Ok(Stored {
        index: *index,
        name: rest,
        value,
    })
}

/// Turns an access control list from the form of `getxattr` (version 2, eight bytes an entry) into the one on disk
/// (version 1, ids only where they mean something).
fn disk_acl(value: &[u8]) -> Option<Vec<u8>> {
    let (version, entries) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != 2 || entries.len() % 8 != 0 {
        return None;
    }
    let mut out = 1u32.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        out.extend_from_slice(&entry[..4]);
        // ACL_USER and ACL_GROUP.
        if matches!(entry[0], 0x02 | 0x08) {
            out.extend_from_slice(&entry[4..]);
        }
    }
    Some(out)
}
