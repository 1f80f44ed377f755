//! Directory blocks: linear lists of entries, each block closed by a checksum.
//!
//! No hash index is written. Linux reads and grows such directories as they are; at the sizes that distributions ship
//! (some thousand names) a lookup that is not in the dentry cache reads a few blocks more.
//! (Linux `Documentation/filesystems/ext4/directory.rst`)

use super::bytes::{low16, put};
use super::checksum::crc;
use super::geometry::BLOCK_USIZE;

const HEADER: usize = 8;
/// A fake entry that holds the block's checksum.
const TAIL: usize = 12;
const TAIL_TYPE: u8 = 0xde;
const USABLE: usize = BLOCK_USIZE - TAIL;

/// The type byte of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum EntryType {
    File = 1,
    Dir = 2,
    CharDevice = 3,
    BlockDevice = 4,
    Fifo = 5,
    Socket = 6,
    Symlink = 7,
}

/// One name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) inode: u32,
    pub(super) name: &'a [u8],
    pub(super) kind: EntryType,
}

fn size_of(entry: &Entry<'_>) -> usize {
    (HEADER + entry.name.len()).next_multiple_of(4)
}

/// Packs entries into blocks; the caller gives `.` and `..` first. `seed` is the directory inode's.
pub(super) fn blocks(entries: &[Entry<'_>], seed: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let (mut used, mut last) = (USABLE, 0);
    for entry in entries {
        if used + size_of(entry) > USABLE {
            close(&mut out, used, last, seed);
            out.resize(out.len() + BLOCK_USIZE, 0);
            used = 0;
        }
        let base = out.len() - BLOCK_USIZE;
        let bytes = &mut out[base + used..];
        put(bytes, 0, entry.inode.to_le_bytes());
        put(bytes, 4, low16(size_of(entry) as u64));
        bytes[6] = entry.name.len() as u8;
        bytes[7] = entry.kind as u8;
        bytes[HEADER..HEADER + entry.name.len()].copy_from_slice(entry.name);
        last = used;
        used += size_of(entry);
    }
    close(&mut out, used, last, seed);
    out
}

/// How many blocks these name lengths take, `.` and `..` included.
pub(super) fn block_count(names: impl Iterator<Item = usize>) -> u64 {
    let (mut blocks, mut used) = (1, 24);
    for name in names {
        let size = (HEADER + name).next_multiple_of(4);
        if used + size > USABLE {
            blocks += 1;
            used = 0;
        }
        used += size;
    }
    blocks
}

/// Stretches the last entry over what is left of the last block, and seals it.
fn close(out: &mut [u8], used: usize, last: usize, seed: u32) {
    let Some(base) = out.len().checked_sub(BLOCK_USIZE) else {
        return;
    };
    let block = &mut out[base..];
    if used < USABLE {
        put(block, last + 4, low16((USABLE - last) as u64));
    }
    put(block, USABLE + 4, low16(TAIL as u64));
    block[USABLE + 7] = TAIL_TYPE;
    let checksum = crc(seed, &block[..USABLE]);
    put(block, USABLE + 8, checksum.to_le_bytes());
}
