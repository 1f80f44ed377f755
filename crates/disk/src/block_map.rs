//! Which layer holds each block: one merged map for a whole stack, so that a read costs the same
//! under ten layers as under one.
//!
//! Blocks are grouped into leaves. A leaf that no layer touches does not exist, and one whose
//! blocks all have the same owner is a single byte: memory grows with what is scattered, not with
//! the disk.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Blocks in a leaf.
pub(crate) const LEAF_BLOCKS: u64 = 4096;
/// Bytes of a leaf in a layer file: two bits per block.
pub(crate) const LEAF_BYTES: usize = LEAF_BLOCKS as usize / 4;

/// A leaf as a layer file has it.
pub(crate) type LeafBytes = [u8; LEAF_BYTES];

/// Two bits per block in a layer file: the layer says nothing about it,
const ABSENT: u8 = 0;
/// the layer holds its data,
const DATA: u8 = 1;
/// or it reads as zero, whatever is below.
const ZERO: u8 = 2;

/// Who holds a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The base image.
    Base,
    /// The layer of this number, counted from 1 at the bottom.
    Layer(u8),
    /// No layer holds the block, which reads as zero. `top` says whether the top layer records
    /// that.
    Zero {
        /// Whether the top layer says so, or one below.
        top: bool,
    },
}

/// The most layers in a stack: the other values of a byte are the base and the two kinds of zero.
pub(crate) const MAX_LAYERS: usize = 253;

const ZERO_BELOW: u8 = 254;
const ZERO_TOP: u8 = 255;

impl Owner {
    fn code(self) -> u8 {
        match self {
            Self::Base => 0,
            Self::Layer(number) => number,
            Self::Zero { top: false } => ZERO_BELOW,
            Self::Zero { top: true } => ZERO_TOP,
        }
    }

    fn of(code: u8) -> Self {
        match code {
            0 => Self::Base,
            ZERO_BELOW => Self::Zero { top: false },
            ZERO_TOP => Self::Zero { top: true },
            number => Self::Layer(number),
        }
    }
}

#[derive(Clone)]
enum Leaf {
    Uniform(u8),
    /// Shared with copies of the map until one of them changes it.
    Mixed(Arc<[u8; LEAF_BLOCKS as usize]>),
}

/// A leaf of a layer file has two bits that mean nothing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadLeaf;

/// The merged map of a stack. A copy shares what neither changes.
#[derive(Clone, Default)]
pub(crate) struct BlockMap {
    leaves: BTreeMap<u64, Leaf>,
}

impl BlockMap {
    /// The owner of `block`.
    pub(crate) fn owner(&self, block: u64) -> Owner {
        Owner::of(match self.leaves.get(&(block / LEAF_BLOCKS)) {
            None => 0,
            Some(Leaf::Uniform(code)) => *code,
            Some(Leaf::Mixed(codes)) => codes[(block % LEAF_BLOCKS) as usize],
        })
    }

    /// The longest run of blocks from `blocks.start` on with the same owner, within `blocks`.
    pub(crate) fn run(&self, blocks: Range<u64>) -> (Owner, u64) {
        let owner = self.owner(blocks.start);
        let code = owner.code();
        let mut end = blocks.start;
        while end < blocks.end {
            let leaf_end = (end / LEAF_BLOCKS + 1) * LEAF_BLOCKS;
            let stop = leaf_end.min(blocks.end);
            let same = match self.leaves.get(&(end / LEAF_BLOCKS)) {
                None if code == 0 => stop - end,
                Some(Leaf::Uniform(other)) if *other == code => stop - end,
                Some(Leaf::Mixed(codes)) => {
                    let first = (end % LEAF_BLOCKS) as usize;
                    let codes = &codes[first..first + (stop - end) as usize];
                    codes.iter().take_while(|other| **other == code).count() as u64
                }
                _ => 0,
            };
            end += same;
            if end < stop {
                break;
            }
        }
        (owner, end - blocks.start)
    }

    /// Whether all of `blocks` have `owner`.
    pub(crate) fn all_owned(&self, blocks: Range<u64>, owner: Owner) -> bool {
        let len = blocks.end - blocks.start;
        len == 0 || self.run(blocks) == (owner, len)
    }

    /// Gives `blocks` to `owner`.
    pub(crate) fn set(&mut self, blocks: Range<u64>, owner: Owner) {
        let code = owner.code();
        let mut start = blocks.start;
        while start < blocks.end {
            let stop = ((start / LEAF_BLOCKS + 1) * LEAF_BLOCKS).min(blocks.end);
            self.set_in_leaf(start / LEAF_BLOCKS, start % LEAF_BLOCKS, stop - start, code);
            start = stop;
        }
    }

    fn set_in_leaf(&mut self, index: u64, first: u64, count: u64, code: u8) {
        if count == LEAF_BLOCKS {
            self.leaves.insert(index, Leaf::Uniform(code));
            return;
        }
        let leaf = self.leaves.entry(index).or_insert(Leaf::Uniform(0));
        if let Leaf::Uniform(old) = *leaf {
            if old == code {
                return;
            }
            *leaf = Leaf::Mixed(Arc::new([old; LEAF_BLOCKS as usize]));
        }
        if let Leaf::Mixed(codes) = leaf {
            let codes = Arc::make_mut(codes);
            codes[first as usize..(first + count) as usize].fill(code);
            if codes[0] == code && codes.iter().all(|other| *other == code) {
                *leaf = Leaf::Uniform(code);
            }
        }
    }

    /// Puts a leaf of the layer `number`'s file over what the map has.
    pub(crate) fn merge_leaf(
        &mut self,
        index: u64,
        bytes: &LeafBytes,
        number: u8,
        top: bool,
    ) -> Result<(), BadLeaf> {
        let first = index * LEAF_BLOCKS;
        for (position, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            for pair in 0..4 {
                let owner = match byte >> (2 * pair) & 3 {
                    ABSENT => continue,
                    DATA => Owner::Layer(number),
                    ZERO => Owner::Zero { top },
                    _ => return Err(BadLeaf),
                };
                let block = first + position as u64 * 4 + pair;
                self.set(block..block + 1, owner);
            }
        }
        Ok(())
    }

    /// What the top layer, of this `number`, has to say about a leaf.
    pub(crate) fn top_leaf(&self, index: u64, number: u8) -> LeafBytes {
        let mut bytes = [0; LEAF_BYTES];
        for position in 0..LEAF_BLOCKS {
            let state = match self.owner(index * LEAF_BLOCKS + position) {
                Owner::Layer(owner) if owner == number => DATA,
                Owner::Zero { top: true } => ZERO,
                _ => ABSENT,
            };
            bytes[position as usize / 4] |= state << (2 * (position % 4));
        }
        bytes
    }

    /// The top layer is frozen: its zeros are now a lower layer's.
    pub(crate) fn freeze_top(&mut self) {
        for leaf in self.leaves.values_mut() {
            match leaf {
                Leaf::Uniform(code) if *code == ZERO_TOP => *code = ZERO_BELOW,
                Leaf::Uniform(_) => {}
                Leaf::Mixed(codes) if codes.contains(&ZERO_TOP) => Arc::make_mut(codes)
                    .iter_mut()
                    .filter(|code| **code == ZERO_TOP)
                    .for_each(|code| *code = ZERO_BELOW),
                Leaf::Mixed(_) => {}
            }
        }
    }

    /// The layers from `first` up to the one below `top` (numbers) were merged into one, which has
    /// the number `first`; `top` follows it.
    pub(crate) fn merge_layers(&mut self, first: u8, top: u8) {
        let merged = |code: u8| match code {
            ZERO_BELOW | ZERO_TOP => code,
            number if number == top => first + 1,
            number if number > first => first,
            number => number,
        };
        for leaf in self.leaves.values_mut() {
            match leaf {
                Leaf::Uniform(code) => *code = merged(*code),
                Leaf::Mixed(codes) => Arc::make_mut(codes)
                    .iter_mut()
                    .for_each(|code| *code = merged(*code)),
            }
        }
    }

    /// Whether the top layer, of this `number`, says anything at all.
    pub(crate) fn holds(&self, number: u8) -> bool {
        let says = |code: u8| code == number || code == ZERO_TOP;
        self.leaves.values().any(|leaf| match leaf {
            Leaf::Uniform(code) => says(*code),
            Leaf::Mixed(codes) => codes.iter().any(|code| says(*code)),
        })
    }

    /// The leaves that exist, in order.
    pub(crate) fn leaf_indices(&self) -> impl Iterator<Item = u64> {
        self.leaves.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_run_goes_on_over_leaves_and_stops_at_another_owner() {
        let mut map = BlockMap::default();
        map.set(10..3 * LEAF_BLOCKS + 5, Owner::Layer(2));
        assert_eq!(map.run(0..100), (Owner::Base, 10));
        let (owner, len) = map.run(11..u64::from(u32::MAX));
        assert_eq!((owner, len), (Owner::Layer(2), 3 * LEAF_BLOCKS + 5 - 11));
    }

    #[test]
    fn a_leaf_written_block_by_block_shrinks_to_a_byte() {
        let mut map = BlockMap::default();
        for block in 0..LEAF_BLOCKS {
            map.set(block..block + 1, Owner::Layer(1));
        }
        assert!(matches!(map.leaves[&0], Leaf::Uniform(1)));
    }

    #[test]
    fn a_leaf_with_a_meaningless_state_is_refused() {
        let mut bytes = [0; LEAF_BYTES];
        bytes[7] = 0b1100;
        assert_eq!(
            BlockMap::default().merge_leaf(0, &bytes, 1, true),
            Err(BadLeaf)
        );
    }

    proptest! {
        #[test]
        fn the_map_agrees_with_a_plain_array(
            sets in prop::collection::vec((0u64..9000, 1u64..5000, 0u8..4), 1..20)
        ) {
            let mut map = BlockMap::default();
            let mut plain = vec![Owner::Base; 14_000];
            for (start, len, kind) in sets {
                let owner = match kind {
                    0 => Owner::Layer(1),
                    1 => Owner::Layer(2),
                    2 => Owner::Zero { top: true },
                    _ => Owner::Zero { top: false },
                };
                map.set(start..start + len, owner);
                plain[start as usize..(start + len) as usize].fill(owner);
            }
            let mut block = 0;
            while block < 14_000 {
                let (owner, len) = map.run(block..14_000);
                prop_assert!(len > 0);
                prop_assert!(plain[block as usize..(block + len) as usize].iter().all(|o| *o == owner));
                block += len;
                prop_assert!(block == 14_000 || plain[block as usize] != owner);
            }
            // What the top says survives its file form, seen from an empty map.
            let mut loaded = BlockMap::default();
            for index in map.leaf_indices() {
                loaded.merge_leaf(index, &map.top_leaf(index, 2), 2, true).unwrap();
            }
            for (block, owner) in plain.iter().enumerate() {
                let expected = match owner {
                    Owner::Layer(2) | Owner::Zero { top: true } => *owner,
                    _ => Owner::Base,
                };
                prop_assert_eq!(loaded.owner(block as u64), expected);
            }
        }
    }
}
