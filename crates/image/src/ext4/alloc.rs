//! The block allocator: hands out the disk from front to back, around the backup superblocks.
//!
//! No block is freed while an image is made, so a cursor and one bitmap are sufficient.

use super::geometry::{BLOCKS_PER_GROUP, Geometry};

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// The disk is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

pub(super) struct Allocator {
    geometry: Geometry,
    next: u64,
    bitmap: Vec<u8>,
}

impl Allocator {
    /// All blocks free but the superblocks, their backups and the descriptors.
    pub(super) fn new(geometry: Geometry) -> Self {
        let bytes = geometry.groups * BLOCKS_PER_GROUP / 8;
        let mut this = Self {
            geometry,
            next: 0,
            bitmap: vec![0; bytes as usize],
        };
        for group in (0..geometry.groups).filter(|&group| Geometry::has_backup(group)) {
            this.mark(this.reserved(group));
        }
        this
    }

    /// The superblock and descriptors at a group's start.
    fn reserved(&self, group: u64) -> Run {
        Run {
            start: group * BLOCKS_PER_GROUP,
            len: 1 + self.geometry.descriptor_blocks,
        }
    }

    fn mark(&mut self, run: Run) {
        for block in run.start..(run.start + run.len).min(self.geometry.blocks) {
            self.bitmap[(block / 8) as usize] |= 1 << (block % 8);
        }
    }

    /// The next free run, at most `want` blocks long.
    pub(super) fn some(&mut self, want: u64) -> Result<Run, Full> {
        let group = self.next / BLOCKS_PER_GROUP;
        if Geometry::has_backup(group) {
            let reserved = self.reserved(group);
            self.next = self.next.max(reserved.start + reserved.len);
        }
        let wall = self.next_backup(self.next).min(self.geometry.blocks);
        if self.next >= wall {
            return Err(Full);
        }
        let run = Run {
            start: self.next,
            len: want.min(wall - self.next),
        };
        self.next += run.len;
        self.mark(run);
        Ok(run)
    }

    /// Exactly `want` blocks in one run; blocks too few for it before a backup are skipped.
    pub(super) fn contiguous(&mut self, want: u64) -> Result<Run, Full> {
        loop {
            let before = self.next;
            let run = self.some(want)?;
            if run.len == want {
                return Ok(run);
            }
            // The short run stays unused, which costs a few blocks before a backup.
            for block in run.start..run.start + run.len {
                self.bitmap[(block / 8) as usize] &= !(1 << (block % 8));
            }
            debug_assert!(self.next > before);
        }
    }

    /// Runs that add up to `want` blocks.
    pub(super) fn runs(&mut self, want: u64) -> Result<Vec<Run>, Full> {
        let mut runs: Vec<Run> = Vec::new();
        let mut left = want;
        while left > 0 {
            let run = self.some(left)?;
            left -= run.len;
            runs.push(run);
        }
        Ok(runs)
    }

    fn next_backup(&self, block: u64) -> u64 {
        let mut group = block / BLOCKS_PER_GROUP + 1;
        while group < self.geometry.groups && !Geometry::has_backup(group) {
            group += 1;
        }
        group * BLOCKS_PER_GROUP
    }

    /// One group's bitmap block; bits beyond the disk's end are set.
    pub(super) fn group_bitmap(&self, group: u64) -> Vec<u8> {
        let bytes = (BLOCKS_PER_GROUP / 8) as usize;
        let from = group as usize * bytes;
        let mut bitmap = self.bitmap[from..from + bytes].to_vec();
        for block in self.geometry.blocks_in(group)..BLOCKS_PER_GROUP {
            bitmap[(block / 8) as usize] |= 1 << (block % 8);
        }
        bitmap
    }

    /// Free blocks of one group.
    pub(super) fn free_in(&self, group: u64) -> u64 {
        let used: u32 = self
            .group_bitmap(group)
            .iter()
            .map(|byte| byte.count_ones())
            .sum();
        BLOCKS_PER_GROUP - u64::from(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_never_touch_backups_and_never_overlap() {
        let geometry = Geometry::new(4 << 30, 1000).unwrap();
        let mut alloc = Allocator::new(geometry);
        let mut seen = vec![false; geometry.blocks as usize];
        while let Ok(run) = alloc.some(10_000) {
            for block in run.start..run.start + run.len {
                assert!(
                    !std::mem::replace(&mut seen[block as usize], true),
                    "{block} given twice"
                );
                let reserved = alloc.reserved(block / BLOCKS_PER_GROUP);
                assert!(
                    !Geometry::has_backup(block / BLOCKS_PER_GROUP)
                        || block >= reserved.start + reserved.len
                );
            }
        }
        assert!((0..geometry.groups).all(|group| alloc.free_in(group) == 0));
    }

    #[test]
    fn a_contiguous_run_is_whole_or_refused() {
        let geometry = Geometry::new(512 << 20, 1000).unwrap();
        let mut alloc = Allocator::new(geometry);
        alloc.some(32_000).unwrap();
        let run = alloc.contiguous(5000).unwrap();
        assert_eq!(run.len, 5000);
        assert!(run.start > BLOCKS_PER_GROUP);
        assert_eq!(alloc.contiguous(200_000), Err(Full));
    }
}
