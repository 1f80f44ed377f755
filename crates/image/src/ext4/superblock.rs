//! The superblock, the group descriptors and the journal's own superblock.
//! (Linux `Documentation/filesystems/ext4/{super,group_descr,journal}.rst`)

use super::bytes::{high32, low16, low32, mid16, put};
use super::checksum::crc;
use super::geometry::{
    BLOCK, BLOCK_USIZE, BLOCKS_PER_GROUP, DESCRIPTOR_SIZE, FIRST_INODE, Geometry, INODE_SIZE,
};

const HAS_JOURNAL: u32 = 0x4;
const EXT_ATTR: u32 = 0x8;
const DIR_INDEX: u32 = 0x20;
const FILETYPE: u32 = 0x2;
const EXTENTS: u32 = 0x40;
const BIT64: u32 = 0x80;
const FLEX_BG: u32 = 0x200;
const SPARSE_SUPER: u32 = 0x1;
const LARGE_FILE: u32 = 0x2;
const HUGE_FILE: u32 = 0x8;
const DIR_NLINK: u32 = 0x20;
const EXTRA_ISIZE: u32 = 0x40;
const METADATA_CSUM: u32 = 0x400;

pub(super) const JOURNAL_INODE: u32 = 8;
const SUPERBLOCK: usize = 1024;

/// Everything a superblock says that the geometry does not.
pub(super) struct Facts<'a> {
    pub(super) geometry: Geometry,
    pub(super) uuid: [u8; 16],
    pub(super) label: &'a str,
    pub(super) created: u64,
    pub(super) free_blocks: u64,
    pub(super) free_inodes: u64,
    /// The journal inode's 60 bytes of extents, kept here for repair.
    pub(super) journal_extents: [u8; 60],
}

/// The superblock as it stands at the start of this group.
pub(super) fn superblock(facts: &Facts<'_>, group: u64) -> [u8; SUPERBLOCK] {
    let mut sb = [0; SUPERBLOCK];
    let Geometry {
        blocks,
        groups,
        inodes_per_group,
        ..
    } = facts.geometry;
    put(&mut sb, 0, low32(groups * inodes_per_group));
    put(&mut sb, 4, low32(blocks));
    put(&mut sb, 12, low32(facts.free_blocks));
    put(&mut sb, 16, low32(facts.free_inodes));
    // Blocks and clusters of 1024 << 2 bytes.
    put(&mut sb, 24, 2u32.to_le_bytes());
    put(&mut sb, 28, 2u32.to_le_bytes());
    put(&mut sb, 32, low32(BLOCKS_PER_GROUP));
    put(&mut sb, 36, low32(BLOCKS_PER_GROUP));
    put(&mut sb, 40, low32(inodes_per_group));
    put(&mut sb, 48, low32(facts.created));
    // Never check after so many mounts.
    put(&mut sb, 54, 0xffffu16.to_le_bytes());
    put(&mut sb, 56, 0xef53u16.to_le_bytes());
    // Cleanly unmounted; on errors continue, as mke2fs has it.
    put(&mut sb, 58, 1u16.to_le_bytes());
    put(&mut sb, 60, 1u16.to_le_bytes());
    put(&mut sb, 64, low32(facts.created));
    put(&mut sb, 76, 1u32.to_le_bytes());
    put(&mut sb, 84, FIRST_INODE.to_le_bytes());
    put(&mut sb, 88, low16(INODE_SIZE));
    put(&mut sb, 90, low16(group));
    put(
        &mut sb,
        92,
        (HAS_JOURNAL | EXT_ATTR | DIR_INDEX).to_le_bytes(),
    );
    put(
        &mut sb,
        96,
        (FILETYPE | EXTENTS | BIT64 | FLEX_BG).to_le_bytes(),
    );
    let ro = SPARSE_SUPER | LARGE_FILE | HUGE_FILE | DIR_NLINK | EXTRA_ISIZE | METADATA_CSUM;
    put(&mut sb, 100, ro.to_le_bytes());
    put(&mut sb, 104, facts.uuid);
    let label = facts.label.as_bytes();
    sb[120..120 + label.len().min(16)].copy_from_slice(&label[..label.len().min(16)]);
    put(&mut sb, 224, JOURNAL_INODE.to_le_bytes());
    // Directory hashing: any seed will do, and half-MD4 is what Linux defaults to.
    let seed = blake3::hash(&facts.uuid);
    sb[236..252].copy_from_slice(&seed.as_bytes()[..16]);
    sb[252] = 1;
    // The backup of the journal's inode that follows at 268 holds its block map and size.
    sb[253] = 1;
    put(&mut sb, 254, low16(DESCRIPTOR_SIZE));
    // Mount options: user attributes and access control lists.
    put(&mut sb, 256, 0xcu32.to_le_bytes());
    put(&mut sb, 264, low32(facts.created));
    put(&mut sb, 268, facts.journal_extents);
    put(
        &mut sb,
        268 + 60,
        high32(facts.geometry.journal_blocks * BLOCK),
    );
    put(
        &mut sb,
        268 + 64,
        low32(facts.geometry.journal_blocks * BLOCK),
    );
    put(&mut sb, 336, high32(blocks));
    put(&mut sb, 344, high32(facts.free_blocks));
    put(&mut sb, 348, 32u16.to_le_bytes());
    put(&mut sb, 350, 32u16.to_le_bytes());
    // Directory hashes are of signed characters.
    put(&mut sb, 352, 1u32.to_le_bytes());
    // Sixteen groups to a flexible one; checksums are CRC32C.
    sb[0x174] = 4;
    sb[0x175] = 1;
    let checksum = crc(!0, &sb[..1020]);
    put(&mut sb, 1020, checksum.to_le_bytes());
    sb
}

/// What a group descriptor says.
pub(super) struct Group {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_blocks: u64,
    pub(super) free_inodes: u64,
    pub(super) dirs: u64,
    /// Inodes at the table's end that were never used.
    pub(super) unused: u64,
    pub(super) block_bitmap_checksum: u32,
    pub(super) inode_bitmap_checksum: u32,
}

impl Group {
    /// The descriptor of this group. Inode tables of a new sparse file are zeros, and said to be so: the guest then
    /// has no reason to write them.
    pub(super) fn encode(&self, number: u64, seed: u32) -> [u8; DESCRIPTOR_SIZE as usize] {
        const INODE_ZEROED: u16 = 4;
        let mut d = [0; DESCRIPTOR_SIZE as usize];
        put(&mut d, 0, low32(self.block_bitmap));
        put(&mut d, 4, low32(self.inode_bitmap));
        put(&mut d, 8, low32(self.inode_table));
        put(&mut d, 12, low16(self.free_blocks));
        put(&mut d, 14, low16(self.free_inodes));
        put(&mut d, 16, low16(self.dirs));
        put(&mut d, 18, INODE_ZEROED.to_le_bytes());
        put(&mut d, 24, low16(u64::from(self.block_bitmap_checksum)));
        put(&mut d, 26, low16(u64::from(self.inode_bitmap_checksum)));
        put(&mut d, 28, low16(self.unused));
        put(&mut d, 32, high32(self.block_bitmap));
        put(&mut d, 36, high32(self.inode_bitmap));
        put(&mut d, 40, high32(self.inode_table));
        put(&mut d, 44, mid16(self.free_blocks));
        put(&mut d, 46, mid16(self.free_inodes));
        put(&mut d, 48, mid16(self.dirs));
        put(&mut d, 50, mid16(self.unused));
        put(&mut d, 56, mid16(u64::from(self.block_bitmap_checksum)));
        put(&mut d, 58, mid16(u64::from(self.inode_bitmap_checksum)));
        let checksum = crc(crc(seed, &low32(number)), &d);
        put(&mut d, 30, low16(u64::from(checksum)));
        d
    }
}

/// The first block of an empty journal. All its fields are big-endian. (`journal_superblock_s`)
pub(super) fn journal(blocks: u64, uuid: [u8; 16]) -> Vec<u8> {
    let mut block = vec![0; BLOCK_USIZE];
    let words = [
        0xc03b_3998u32,
        // A superblock of version 2.
        4,
        0,
        BLOCK as u32,
        blocks as u32,
        // The log's first block, and the first commit to expect.
        1,
        1,
    ];
    for (at, word) in words.iter().enumerate() {
        put(&mut block, at * 4, word.to_be_bytes());
    }
    put(&mut block, 48, uuid);
    put(&mut block, 64, 1u32.to_be_bytes());
    block
}
