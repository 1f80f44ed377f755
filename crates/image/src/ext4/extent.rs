//! Extent trees, which map the parts of a file to blocks.

use super::alloc::Run;
use super::bytes::{low16, low32, put};
use super::checksum::crc;
use super::geometry::BLOCK_USIZE;

const MAGIC: u16 = 0xf30a;
const ENTRY: usize = 12;
/// The longest initialised extent.
const MAX_EXTENT: u64 = 32_768;
/// Entries in an inode's 60 bytes.
const IN_INODE: usize = 4;
/// Entries in a block: a header, entries, and a checksum after them.
const IN_BLOCK: usize = (BLOCK_USIZE - ENTRY) / ENTRY;

/// An entry of any level: what the first file block is, and an extent's blocks or a child node's block.
#[derive(Clone, Copy)]
struct Entry {
    first: u64,
    start: u64,
    len: Option<u64>,
}

impl Entry {
    fn encode(self, out: &mut [u8]) {
        put(out, 0, low32(self.first));
        match self.len {
            Some(len) => {
                put(out, 4, low16(len));
                put(out, 6, low16(self.start >> 32));
                put(out, 8, low32(self.start));
            }
            None => {
                put(out, 4, low32(self.start));
                put(out, 8, low16(self.start >> 32));
            }
        }
    }
}

fn node(out: &mut [u8], entries: &[Entry], max: usize, depth: u16) {
    put(out, 0, MAGIC.to_le_bytes());
    put(out, 2, low16(entries.len() as u64));
    put(out, 4, low16(max as u64));
    put(out, 6, depth.to_le_bytes());
    for (entry, bytes) in entries.iter().zip(out[ENTRY..].chunks_exact_mut(ENTRY)) {
        entry.encode(bytes);
    }
}

/// A run of blocks, and the block of the file that it begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    pub(super) first: u64,
    pub(super) run: Run,
}

/// Runs that follow each other in a file, from this block on.
pub(super) fn mapped(runs: Vec<Run>, first: u64) -> impl Iterator<Item = Mapped> {
    runs.into_iter().scan(first, |next, run| {
        let first = *next;
        *next += run.len;
        Some(Mapped { first, run })
    })
}

/// The extent tree of a file that is made of these runs, in order; what lies between them are holes.
///
/// `place` stores a node block that lies outside the inode and says where. Returns the inode's 60 bytes and how many
/// blocks were placed.
pub(super) fn build<E>(
    runs: &[Mapped],
    seed: u32,
    mut place: impl FnMut(&[u8]) -> Result<u64, E>,
) -> Result<([u8; 60], u64), E> {
    let mut level = Vec::new();
    for Mapped { first, run } in runs {
        let mut done = 0;
        while done < run.len {
            let len = MAX_EXTENT.min(run.len - done);
            level.push(Entry {
                first: first + done,
                start: run.start + done,
                len: Some(len),
            });
            done += len;
        }
    }
    let (mut depth, mut placed) = (0u16, 0);
    while level.len() > IN_INODE {
        let mut above = Vec::new();
        for part in level.chunks(IN_BLOCK) {
            let mut block = vec![0; BLOCK_USIZE];
            node(&mut block, part, IN_BLOCK, depth);
            let tail = ENTRY + IN_BLOCK * ENTRY;
            let checksum = crc(seed, &block[..tail]);
            put(&mut block, tail, checksum.to_le_bytes());
            above.push(Entry {
                first: part[0].first,
                start: place(&block)?,
                len: None,
            });
            placed += 1;
        }
        level = above;
        depth += 1;
    }
    let mut out = [0; 60];
    node(&mut out, &level, IN_INODE, depth);
    Ok((out, placed))
}
