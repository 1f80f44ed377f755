//! The writing pass: allocates, writes data, then the tables that describe it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::alloc::{Allocator, Full, Run};
use super::checksum::{crc, inode_seed};
use super::directory::{self, Entry, EntryType};
use super::extent::{self, Mapped};
use super::geometry::{
    BLOCK, BLOCK_USIZE, BLOCKS_PER_GROUP, DESCRIPTOR_SIZE, FIRST_INODE, Geometry, INODE_SIZE,
    INODES_PER_BLOCK, too_small,
};
use super::inode::{Inode, Map, type_bits};
use super::superblock::{Facts, Group, JOURNAL_INODE, journal, superblock};
use super::xattr::{self, Xattrs};
use super::{Options, Plan};
use crate::progress::Progress;
use crate::tree::{Content, ContentReader, Kind, Meta, NodeId, Tree};
use crate::{ImageError, Result};

/// Symbolic links shorter than this live in the inode.
pub(super) const INLINE_LINK: usize = 60;
/// Linux's limit on hard links; directories with more subdirectories say 1 instead.
const MAX_LINKS: u64 = 65_000;
/// The largest file: its blocks are numbered with 32 bits, the last number is not used.
const MAX_FILE: u64 = (u32::MAX as u64) * BLOCK;
/// File contents are copied in pieces of this many bytes.
const CHUNK: usize = 1 << 20;

pub(super) struct Writer<'a> {
    tree: &'a Tree,
    plan: &'a Plan,
    geometry: Geometry,
    options: &'a Options,
    /// The disk's size, for messages.
    total: u64,
    file: &'a File,
    path: &'a Path,
    progress: &'a dyn Progress,
    seed: u32,
    alloc: Allocator,
    groups: Vec<Group>,
    buffer: Vec<u8>,
}

impl<'a> Writer<'a> {
    #[allow(
        clippy::too_many_arguments,
        reason = "called once, by the module that owns all of these"
    )]
    pub(super) fn new(
        tree: &'a Tree,
        plan: &'a Plan,
        geometry: Geometry,
        options: &'a Options,
        total: u64,
        file: &'a File,
        path: &'a Path,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let mut this = Self {
            tree,
            plan,
            geometry,
            options,
            total,
            file,
            path,
            progress,
            seed: crc(!0, &options.uuid),
            alloc: Allocator::new(geometry),
            groups: Vec::new(),
            buffer: vec![0; CHUNK],
        };
        this.place_tables()?;
        Ok(this)
    }

    /// Bitmaps of all groups first, then all inode tables: one region at the disk's start.
    fn place_tables(&mut self) -> Result<()> {
        let bitmaps = (0..2 * self.geometry.groups)
            .map(|_| self.block())
            .collect::<Result<Vec<_>>>()?;
        for pair in bitmaps.chunks_exact(2) {
            let table = self.alloc.contiguous(self.geometry.table_blocks());
            let table = table.map_err(|Full| too_small(self.total))?;
            self.groups.push(Group {
                block_bitmap: pair[0],
                inode_bitmap: pair[1],
                inode_table: table.start,
                free_blocks: 0,
                free_inodes: 0,
                dirs: 0,
                unused: 0,
                block_bitmap_checksum: 0,
                inode_bitmap_checksum: 0,
            });
        }
        Ok(())
    }

    /// Writes everything.
    pub(super) fn run(mut self) -> Result<()> {
        let journal_extents = self.write_journal()?;
        for index in 0..self.plan.order.len() {
            let (id, parent) = self.plan.order[index];
            self.write_node(id, parent)?;
        }
        self.write_groups(journal_extents)
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file
            .write_all_at(bytes, at)
            .map_err(ImageError::io("write the disk image", self.path))
    }

    fn block(&mut self) -> Result<u64> {
        self.alloc
            .some(1)
            .map(|run| run.start)
            .map_err(|Full| too_small(self.total))
    }

    fn runs(&mut self, blocks: u64) -> Result<Vec<Run>> {
        self.alloc
            .runs(blocks)
            .map_err(|Full| too_small(self.total))
    }

    /// An empty journal in one run; returns its extent tree.
    fn write_journal(&mut self) -> Result<[u8; 60]> {
        let blocks = self.geometry.journal_blocks;
        let run = self
            .alloc
            .contiguous(blocks)
            .map_err(|Full| too_small(self.total))?;
        self.put(&journal(blocks, self.options.uuid), run.start * BLOCK)?;
        let (tree, placed) = self.extents(&[Mapped { first: 0, run }], JOURNAL_INODE)?;
        let meta = Meta::root(0o600, self.options.created as i64);
        let inode = Inode {
            meta: &meta,
            kind: 0o100_000,
            links: 1,
            size: blocks * BLOCK,
            map: Map::Extents(tree, blocks + placed),
            xattrs: &Xattrs::None,
            xattr_block: 0,
        };
        self.put_inode(&inode, JOURNAL_INODE)?;
        Ok(tree)
    }

    fn extents(&mut self, runs: &[Mapped], inode: u32) -> Result<([u8; 60], u64)> {
        extent::build(runs, inode_seed(self.seed, inode), |node| {
            let block = self.block()?;
            self.put(node, block * BLOCK)?;
            Ok(block)
        })
    }

    fn put_inode(&self, inode: &Inode<'_>, number: u32) -> Result<()> {
        let index = u64::from(number - 1);
        let group = &self.groups[(index / self.geometry.inodes_per_group) as usize];
        let at = group.inode_table * BLOCK + index % self.geometry.inodes_per_group * INODE_SIZE;
        self.put(&inode.encode(number, self.seed), at)
    }

    fn write_node(&mut self, id: NodeId, parent: NodeId) -> Result<()> {
        let tree = self.tree;
        let node = tree.node(id);
        let number = self.plan.inode[id.index()];
        let mut xattrs = xattr::encode(&node.meta.xattrs)
            .map_err(|why| ImageError::malformed(self.path_of(id), why))?;
        let mut xattr_block = 0;
        if let Xattrs::Block(bytes) = &mut xattrs {
            xattr_block = self.block()?;
            xattr::seal(bytes, xattr_block, self.seed);
            self.put(bytes, xattr_block * BLOCK)?;
        }
        let (size, map) = match &node.kind {
            Kind::Dir(_) => {
                let bytes = self.directory_bytes(id, parent);
                (bytes.len() as u64, self.write_blocks(&bytes, number)?)
            }
            Kind::File(content) if content.len() > MAX_FILE => {
                return Err(ImageError::malformed(
                    self.path_of(id),
                    "it is larger than the 16 TiB that a file of ext4 can have",
                ));
            }
            Kind::File(content) => (content.len(), self.write_content(content, number)?),
            Kind::Symlink(target) if target.len() < INLINE_LINK => {
                (target.len() as u64, Map::Inline(target.clone()))
            }
            Kind::Symlink(target) if target.len() < BLOCK_USIZE => {
                (target.len() as u64, self.write_blocks(target, number)?)
            }
            Kind::Symlink(_) => {
                return Err(ImageError::malformed(
                    self.path_of(id),
                    "a link's target is too long",
                ));
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                (0, Map::Device(*major, *minor))
            }
            Kind::Fifo | Kind::Socket => (0, Map::Nothing),
        };
        let links = match self.plan.links[id.index()] {
            links if links <= MAX_LINKS => links as u16,
            _ if matches!(node.kind, Kind::Dir(_)) => 1,
            _ => {
                return Err(ImageError::malformed(
                    self.path_of(id),
                    "it has more than 65000 hard links",
                ));
            }
        };
        let meta = &node.meta;
        let kind = type_bits(&node.kind);
        self.put_inode(
            &Inode {
                meta,
                kind,
                links,
                size,
                map,
                xattrs: &xattrs,
                xattr_block,
            },
            number,
        )
    }

    /// A path to this node, for messages.
    fn path_of(&self, wanted: NodeId) -> String {
        let mut names = Vec::new();
        let mut here = wanted;
        while let Some((_, parent)) = self.plan.order.iter().find(|(id, _)| *id == here)
            && here != NodeId::ROOT
        {
            let name = self
                .tree
                .dir(*parent)
                .into_iter()
                .flatten()
                .find(|(_, id)| **id == here);
            names.push(
                name.map(|(name, _)| String::from_utf8_lossy(name).into_owned())
                    .unwrap_or_default(),
            );
            here = *parent;
        }
        names.push(String::new());
        names.reverse();
        names.join("/")
    }

    fn directory_bytes(&self, id: NodeId, parent: NodeId) -> Vec<u8> {
        let inode = |id: NodeId| self.plan.inode[id.index()];
        let dir = |id, name| Entry {
            inode: inode(id),
            name,
            kind: EntryType::Dir,
        };
        let mut entries = vec![dir(id, b"."), dir(parent, b"..")];
        for (name, &child) in self.tree.dir(id).into_iter().flatten() {
            let kind = match &self.tree.node(child).kind {
                Kind::File(_) => EntryType::File,
                Kind::Dir(_) => EntryType::Dir,
                Kind::CharDevice { .. } => EntryType::CharDevice,
                Kind::BlockDevice { .. } => EntryType::BlockDevice,
                Kind::Fifo => EntryType::Fifo,
                Kind::Socket => EntryType::Socket,
                Kind::Symlink(_) => EntryType::Symlink,
            };
            entries.push(Entry {
                inode: inode(child),
                name,
                kind,
            });
        }
        directory::blocks(&entries, inode_seed(self.seed, inode(id)))
    }

    /// Writes bytes held in memory into new blocks.
    fn write_blocks(&mut self, bytes: &[u8], inode: u32) -> Result<Map> {
        let blocks = (bytes.len() as u64).div_ceil(BLOCK);
        let runs = self.runs(blocks)?;
        let mut rest = bytes;
        for run in &runs {
            let (part, after) = rest.split_at(rest.len().min((run.len * BLOCK) as usize));
            self.put(part, run.start * BLOCK)?;
            rest = after;
        }
        let runs: Vec<Mapped> = extent::mapped(runs, 0).collect();
        let (tree, placed) = self.extents(&runs, inode)?;
        Ok(Map::Extents(tree, blocks + placed))
    }

    /// Copies a file's content into new blocks. Its holes stay holes of the file. Other blocks of zeros are allocated
    /// to the file but left as holes of the image: the guest sees no difference, and they cost nothing.
    fn write_content(&mut self, content: &Content, inode: u32) -> Result<Map> {
        let reader = content.open()?;
        let mut all = Vec::new();
        let mut blocks = 0;
        for &(offset, len) in content.data().iter() {
            let runs = self.runs(len.div_ceil(BLOCK))?;
            let from = all.len();
            all.extend(extent::mapped(runs, offset / BLOCK));
            blocks += len.div_ceil(BLOCK);
            for part in &all[from..] {
                self.copy_run(&reader, *part, offset + len)?;
            }
        }
        reader.finish()?;
        let (tree, placed) = self.extents(&all, inode)?;
        Ok(Map::Extents(tree, blocks + placed))
    }

    /// Copies what a run holds of a content that ends at `end`.
    fn copy_run(&mut self, reader: &ContentReader<'_>, part: Mapped, end: u64) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut from = part.first * BLOCK;
        let mut at = part.run.start * BLOCK;
        let end = end.min(from + part.run.len * BLOCK);
        while from < end {
            let piece = &mut buffer[..(end - from).min(CHUNK as u64) as usize];
            reader.read_exact_at(piece, from)?;
            self.put_sparse(piece, at)?;
            self.progress.advance(piece.len() as u64);
            at += piece.len() as u64;
            from += piece.len() as u64;
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Writes the runs of blocks that are not all zeros.
    fn put_sparse(&self, bytes: &[u8], at: u64) -> Result<()> {
        let is_zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
        let mut from = 0;
        while from < bytes.len() {
            let mut to = from;
            while to < bytes.len() && !is_zero(&bytes[to..bytes.len().min(to + BLOCK_USIZE)]) {
                to = bytes.len().min(to + BLOCK_USIZE);
            }
            if to > from {
                self.put(&bytes[from..to], at + from as u64)?;
            }
            from = to + BLOCK_USIZE;
        }
        Ok(())
    }

    /// Bitmaps, descriptors and superblocks, when all is allocated.
    fn write_groups(mut self, journal_extents: [u8; 60]) -> Result<()> {
        let per_group = self.geometry.inodes_per_group;
        for &(id, _) in &self.plan.order {
            if self.tree.dir(id).is_some() {
                let index = u64::from(self.plan.inode[id.index()] - 1);
                self.groups[(index / per_group) as usize].dirs += 1;
            }
        }
        // Inodes are used from the first on, without gaps; those below 11 count as used.
        let used_inodes = self.plan.last_inode().max(u64::from(FIRST_INODE) - 1);
        let mut descriptors = Vec::new();
        let (mut free_blocks, mut free_inodes) = (0, 0);
        for number in 0..self.geometry.groups {
            let used = used_inodes
                .saturating_sub(number * per_group)
                .min(per_group);
            let blocks = self.alloc.group_bitmap(number);
            let inodes = inode_bitmap(used, per_group);
            let seed = self.seed;
            let free = self.alloc.free_in(number);
            let group = &mut self.groups[number as usize];
            group.free_blocks = free;
            group.free_inodes = per_group - used;
            group.unused = per_group - used;
            group.block_bitmap_checksum = crc(seed, &blocks);
            group.inode_bitmap_checksum = crc(seed, &inodes[..(per_group / 8) as usize]);
            descriptors.extend_from_slice(&group.encode(number, seed));
            free_blocks += group.free_blocks;
            free_inodes += group.free_inodes;
            let (block_at, inode_at) = (group.block_bitmap * BLOCK, group.inode_bitmap * BLOCK);
            self.put(&blocks, block_at)?;
            self.put(&inodes, inode_at)?;
        }
        debug_assert_eq!(
            descriptors.len() as u64,
            self.geometry.groups * DESCRIPTOR_SIZE
        );
        let facts = Facts {
            geometry: self.geometry,
            uuid: self.options.uuid,
            label: &self.options.label,
            created: self.options.created,
            free_blocks,
            free_inodes,
            journal_extents,
        };
        for group in (0..self.geometry.groups).filter(|&group| Geometry::has_backup(group)) {
            // The first superblock lies behind a boot sector; the copies begin their block.
            let start = group * BLOCKS_PER_GROUP * BLOCK;
            self.put(
                &superblock(&facts, group),
                start + if group == 0 { 1024 } else { 0 },
            )?;
            self.put(&descriptors, start + BLOCK)?;
        }
        Ok(())
    }
}

/// The first `used` bits set, and those beyond the group's inodes.
fn inode_bitmap(used: u64, per_group: u64) -> Vec<u8> {
    let mut bitmap = vec![0u8; BLOCK_USIZE];
    for bit in (0..used).chain(per_group..BLOCKS_PER_GROUP) {
        bitmap[(bit / 8) as usize] |= 1 << (bit % 8);
    }
    debug_assert_eq!(per_group % INODES_PER_BLOCK, 0);
    bitmap
}
