//! Encoding of one inode. (Linux `Documentation/filesystems/ext4/inodes.rst`)

use super::bytes::{high32, low16, low32, mid16, put};
use super::checksum::{crc, inode_seed};
use super::geometry::INODE_SIZE;
use super::xattr::{IN_INODE, Xattrs};
use crate::tree::{Kind, Meta};

/// The inode's block map is an extent tree.
const EXTENTS: u32 = 0x8_0000;
/// Inode fields beyond the first 128 bytes.
const EXTRA: u16 = 32;

/// The content of the inode's 60 bytes of block map.
pub(super) enum Map {
    /// An extent tree, and how many blocks it and its data take.
    Extents([u8; 60], u64),
    /// A short symbolic link's target.
    Inline(Vec<u8>),
    Device(u32, u32),
    Nothing,
}

/// An inode before it has a number.
pub(super) struct Inode<'a> {
    pub(super) meta: &'a Meta,
    /// The type bits of `st_mode`.
    pub(super) kind: u16,
    pub(super) links: u16,
    pub(super) size: u64,
    pub(super) map: Map,
    pub(super) xattrs: &'a Xattrs,
    /// Where the attribute block lies, or 0.
    pub(super) xattr_block: u64,
}

/// The type bits of `st_mode`.
pub(super) fn type_bits(kind: &Kind) -> u16 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice { .. } => 0o020_000,
        Kind::Dir(_) => 0o040_000,
        Kind::BlockDevice { .. } => 0o060_000,
        Kind::File(_) => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Socket => 0o140_000,
    }
}

/// Seconds in 34 bits: the low 32 as a signed number, two more above the nanoseconds.
fn time(seconds: i64, nanoseconds: u32) -> ([u8; 4], [u8; 4]) {
    // The format can represent the years 1901 to 2446.
    let seconds = seconds.clamp(-(1 << 31), (1 << 34) - (1 << 31) - 1);
    let low = seconds as i32;
    let epoch = ((seconds - i64::from(low)) >> 32) as u32 & 3;
    (
        low.to_le_bytes(),
        (nanoseconds.min(999_999_999) << 2 | epoch).to_le_bytes(),
    )
}

impl Inode<'_> {
    pub(super) fn encode(&self, number: u32, seed: u32) -> [u8; INODE_SIZE as usize] {
        let mut out = [0; INODE_SIZE as usize];
        let Meta {
            mode,
            uid,
            gid,
            mtime,
            mtime_ns,
            ..
        } = *self.meta;
        let (seconds, extra) = time(mtime, mtime_ns);
        put(&mut out, 0, (self.kind | mode & 0o7777).to_le_bytes());
        put(&mut out, 2, low16(uid.into()));
        put(&mut out, 4, low32(self.size));
        // Access, change and modification; the time of creation follows below.
        for at in [8, 12, 16] {
            put(&mut out, at, seconds);
        }
        put(&mut out, 24, low16(gid.into()));
        put(&mut out, 26, self.links.to_le_bytes());
        let mut blocks = u64::from(self.xattr_block != 0);
        match &self.map {
            Map::Extents(tree, count) => {
                put(&mut out, 32, EXTENTS.to_le_bytes());
                put(&mut out, 40, *tree);
                blocks += count;
            }
            Map::Inline(target) => out[40..40 + target.len()].copy_from_slice(target),
            Map::Device(major, minor) => device(&mut out, *major, *minor),
            Map::Nothing => {}
        }
        // In sectors.
        put(&mut out, 28, low32(blocks * 8));
        put(&mut out, 104, low32(self.xattr_block));
        put(&mut out, 108, high32(self.size));
        put(&mut out, 116, low16((blocks * 8) >> 32));
        put(&mut out, 118, low16(self.xattr_block >> 32));
        put(&mut out, 120, mid16(uid.into()));
        put(&mut out, 122, mid16(gid.into()));
        put(&mut out, 128, EXTRA.to_le_bytes());
        for at in [132, 136, 140] {
            put(&mut out, at, extra);
        }
        put(&mut out, 144, seconds);
        put(&mut out, 148, extra);
        if let Xattrs::Inode(area) = self.xattrs {
            put::<IN_INODE>(&mut out, 160, **area);
        }
        let checksum = crc(inode_seed(seed, number), &out);
        put(&mut out, 124, low16(checksum.into()));
        put(&mut out, 130, mid16(checksum.into()));
        out
    }
}

/// Device numbers: 16 bits in the first word if they fit, else the wide form in the second.
fn device(out: &mut [u8], major: u32, minor: u32) {
    if major < 256 && minor < 256 {
        put(out, 40, (major << 8 | minor).to_le_bytes());
    } else {
        put(
            out,
            44,
            (minor & 0xff | major << 8 | (minor & !0xff) << 12).to_le_bytes(),
        );
    }
}
