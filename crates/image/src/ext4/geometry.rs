//! The numbers that follow from a disk's size: groups, inodes per group, where backups lie.

use crate::{ImageError, Result};

/// Bytes per block. Only this size: it is the page size, and what every distribution uses.
pub(super) const BLOCK: u64 = 4096;
pub(super) const BLOCK_USIZE: usize = 4096;
/// One block's worth of bitmap bits.
pub(super) const BLOCKS_PER_GROUP: u64 = 8 * BLOCK;
pub(super) const INODE_SIZE: u64 = 256;
pub(super) const INODES_PER_BLOCK: u64 = BLOCK / INODE_SIZE;
pub(super) const DESCRIPTOR_SIZE: u64 = 64;
/// The first inode that is not reserved.
pub(super) const FIRST_INODE: u32 = 11;
/// The bytes of disk per inode, as in the defaults of mke2fs.
const BYTES_PER_INODE: u64 = 16384;
/// A last group smaller than this is left unused: its backups would leave no room in it.
const MIN_LAST_GROUP: u64 = 1024;
/// The largest disk: block numbers of bitmaps and tables fit in 32 bits, which keeps every field simple.
const MAX_BLOCKS: u64 = 1 << 31;

/// The layout of one file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) blocks: u64,
    pub(super) groups: u64,
    pub(super) inodes_per_group: u64,
    pub(super) descriptor_blocks: u64,
    pub(super) journal_blocks: u64,
}

impl Geometry {
    /// The layout for a disk of `bytes` that is to hold at least `inodes` inodes (reserved ones included).
    pub(super) fn new(bytes: u64, inodes: u64) -> Result<Self> {
        let mut blocks = bytes / BLOCK;
        if blocks > MAX_BLOCKS {
            return Err(ImageError::Limit {
                what: format!("a disk of {bytes} bytes"),
                limit: format!("{} bytes", MAX_BLOCKS * BLOCK),
                advice: "ask for a smaller disk",
            });
        }
        let tail = blocks % BLOCKS_PER_GROUP;
        if blocks > BLOCKS_PER_GROUP && tail > 0 && tail < MIN_LAST_GROUP {
            blocks -= tail;
        }
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP).max(1);
        let wanted = (bytes / BYTES_PER_INODE).max(inodes + inodes / 4 + 64);
        let inodes_per_group = wanted
            .div_ceil(groups)
            .next_multiple_of(INODES_PER_BLOCK)
            .min(BLOCKS_PER_GROUP);
        if inodes_per_group * groups < inodes {
            return Err(too_small(bytes));
        }
        let journal_blocks = match blocks {
            0..2048 => return Err(too_small(bytes)),
            2048..32_768 => 1024,
            32_768..262_144 => 4096,
            262_144..524_288 => 8192,
            _ => 16_384,
        };
        Ok(Self {
            blocks,
            groups,
            inodes_per_group,
            descriptor_blocks: (groups * DESCRIPTOR_SIZE).div_ceil(BLOCK),
            journal_blocks,
        })
    }

    /// Blocks of one group's inode table.
    pub(super) fn table_blocks(&self) -> u64 {
        self.inodes_per_group / INODES_PER_BLOCK
    }

    /// The blocks that this group has; only the last may have fewer than the rest.
    pub(super) fn blocks_in(&self, group: u64) -> u64 {
        BLOCKS_PER_GROUP.min(self.blocks - group * BLOCKS_PER_GROUP)
    }

    /// True for groups that begin with a copy of the superblock and the descriptors: 0, 1 and powers of 3, 5 and 7.
    pub(super) fn has_backup(group: u64) -> bool {
        let power_of = |base: u64| {
            let mut n = base;
            while n < group {
                n *= base;
            }
            n == group
        };
        group <= 1 || power_of(3) || power_of(5) || power_of(7)
    }

    /// Everything that is not file data: backups, descriptors, bitmaps, inode tables, journal.
    pub(super) fn overhead_blocks(&self) -> u64 {
        let backups = (0..self.groups)
            .filter(|&group| Self::has_backup(group))
            .count() as u64;
        backups * (1 + self.descriptor_blocks)
            + self.groups * (2 + self.table_blocks())
            + self.journal_blocks
    }
}

pub(super) fn too_small(bytes: u64) -> ImageError {
    ImageError::Limit {
        what: "the image's content".to_owned(),
        limit: format!("{bytes} bytes of disk"),
        advice: "ask for a larger disk, or leave its size out to have it computed",
    }
}
