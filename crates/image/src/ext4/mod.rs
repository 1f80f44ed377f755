//! Writes a file tree as an ext4 file system, in one pass, without mounting anything and without any privilege.
//!
//! Why our own writer. `mke2fs -d DIR` takes owners, device nodes and attributes from real files, so the tree must
//! first be unpacked by root; its tar input needs e2fsprogs 1.47.1 with libarchive, which Debian 12 has not. The pure
//! Rust writer at hand (arcbox-ext4 0.1) makes no device nodes, no journal and no checksums, and takes only UTF-8
//! names. This one writes what mke2fs gives a guest today: journal, metadata checksums, 64-bit descriptors, extents.
//! The same tree and options give the same bytes. Tests hold the result against e2fsck and debugfs.
//!
//! What it leaves out: hashed directories and reserved descriptor blocks. Linux works with both missing; a later
//! enlargement of the file system uses the meta_bg layout.

mod alloc;
mod bytes;
mod checksum;
mod directory;
mod extent;
mod geometry;
mod inode;
mod superblock;
#[cfg(test)]
mod tests;
mod writer;
mod xattr;

use std::fs::File;
use std::path::Path;

use crate::progress::Progress;
use crate::tree::{Kind, NodeId, Tree};
use crate::{ImageError, Result};

use geometry::{BLOCK, FIRST_INODE, Geometry};
use writer::Writer;

/// The size of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSize {
    /// The total size in bytes.
    Total(u64),
    /// The size that the content needs, plus this number of free bytes. The image is sparse, so
    /// free space costs nothing.
    Free(u64),
}

impl Default for DiskSize {
    /// One GiB free.
    fn default() -> Self {
        Self::Free(1 << 30)
    }
}

/// The parameters of a file system.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) size: DiskSize,
    pub(crate) uuid: [u8; 16],
    /// The label, at most 16 bytes.
    pub(crate) label: String,
    /// The time of creation, in seconds since 1970.
    pub(crate) created: u64,
}

/// The result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    /// The disk's size in bytes.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// The nodes of a tree in the order of their inode numbers, and how often each is named.
struct Plan {
    /// Each node once, with the directory that names it first.
    order: Vec<(NodeId, NodeId)>,
    /// By node: its inode number, or 0 if nothing names it.
    inode: Vec<u32>,
    /// By node: its link count, subdirectories' `..` included.
    links: Vec<u64>,
}

impl Plan {
    fn new(tree: &Tree) -> Self {
        let mut plan = Self {
            order: Vec::new(),
            inode: vec![0; tree.len()],
            links: vec![0; tree.len()],
        };
        let mut next = FIRST_INODE;
        plan.inode[NodeId::ROOT.index()] = 2;
        plan.links[NodeId::ROOT.index()] = 2;
        plan.order.push((NodeId::ROOT, NodeId::ROOT));
        let mut at = 0;
        while let Some(&(dir, _)) = plan.order.get(at) {
            at += 1;
            for &child in tree
                .dir(dir)
                .into_iter()
                .flat_map(|entries| entries.values())
            {
                let is_dir = tree.dir(child).is_some();
                plan.links[child.index()] += if is_dir { 2 } else { 1 };
                plan.links[dir.index()] += u64::from(is_dir);
                if plan.inode[child.index()] == 0 {
                    plan.inode[child.index()] = next;
                    next += 1;
                    plan.order.push((child, dir));
                }
            }
        }
        plan
    }

    /// The number of the last inode used.
    fn last_inode(&self) -> u64 {
        u64::from(FIRST_INODE) - 1 + self.order.len() as u64 - 1
    }

    /// Blocks that the tree's own content takes, and the bytes of file contents among them.
    fn content(&self, tree: &Tree) -> (u64, u64) {
        let (mut blocks, mut bytes) = (0, 0);
        for &(id, _) in &self.order {
            let node = tree.node(id);
            blocks += match &node.kind {
                Kind::Dir(entries) => directory::block_count(entries.keys().map(Vec::len)),
                Kind::File(content) => {
                    let data = content.data();
                    bytes += data.iter().map(|(_, len)| len).sum::<u64>();
                    let parts: u64 = data.iter().map(|(_, len)| len.div_ceil(BLOCK)).sum();
                    // A part takes an extent, and some 340 extents a block of the tree.
                    parts + data.len() as u64 / 256
                }
                Kind::Symlink(target) => u64::from(target.len() >= writer::INLINE_LINK),
                _ => 0,
            };
            blocks += u64::from(!node.meta.xattrs.is_empty());
        }
        // Extent tree nodes: one for so many blocks is far more than a writer that allocates in runs needs.
        (blocks + blocks / 4096 + 16, bytes)
    }
}

/// The smallest layout with this much content and so many bytes free.
fn fit(content: u64, inodes: u64, free: u64) -> Result<(Geometry, u64)> {
    const MIB_BLOCKS: u64 = (1 << 20) / BLOCK;
    let mut blocks = (content + free / BLOCK).max(4096);
    // More blocks need more tables; a few rounds settle it.
    for _ in 0..16 {
        let geometry = Geometry::new(blocks * BLOCK, inodes)?;
        // Tables and journal are whole runs: what is left before a backup may be too short for them.
        let skipped = geometry.table_blocks().max(geometry.journal_blocks) * 2;
        let need = content + free / BLOCK + geometry.overhead_blocks() + skipped;
        if need <= geometry.blocks {
            return Ok((geometry, blocks * BLOCK));
        }
        blocks = need.next_multiple_of(MIB_BLOCKS);
    }
    Err(geometry::too_small(blocks * BLOCK))
}

/// Writes the tree into an empty file, which becomes a sparse disk image.
///
/// # Errors
/// [`ImageError::Limit`] if the disk is too small, [`ImageError::Malformed`] for what ext4 cannot hold.
pub(crate) fn write(
    tree: &Tree,
    options: &Options,
    file: &File,
    path: &Path,
    progress: &dyn Progress,
) -> Result<Made> {
    if options.label.len() > 16 {
        return Err(ImageError::Unsupported {
            what: format!("the label {:?} has more than 16 bytes", options.label),
            advice: "choose a shorter one".to_owned(),
        });
    }
    let plan = Plan::new(tree);
    let (content, bytes) = plan.content(tree);
    let (geometry, total) = match options.size {
        DiskSize::Total(bytes) => (
            Geometry::new(bytes, plan.last_inode())?,
            bytes / BLOCK * BLOCK,
        ),
        DiskSize::Free(free) => fit(content, plan.last_inode(), free)?,
    };
    progress.begin(crate::progress::Step::Write, Some(bytes));
    file.set_len(total)
        .map_err(ImageError::io("set the size of", path))?;
    Writer::new(tree, &plan, geometry, options, total, file, path, progress)?.run()?;
    Ok(Made {
        bytes: total,
        inodes: plan.order.len() as u64,
    })
}
