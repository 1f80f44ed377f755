//! Layers over a base image: the owner of each block, the ops of a read, and the bytes that a write
//! must copy up.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::ops::Range;

use crate::block_map::{BlockMap, LEAF_BLOCKS, MAX_LAYERS, Owner};
use crate::buffer::Buffers;
use crate::engine::Op;
use crate::error::DiskError;
use crate::layer::{LayerHeader, LayerId};
use crate::op_kind::OpKind;
use crate::request::Request;
use crate::room::Room;

/// The state of a stack. Target 0 of the engine is the base, target *n* the layer *n*.
pub(crate) struct Stack {
    /// Whether there is a base; without one, blocks that no layer holds are zero.
    pub(crate) has_base: bool,
    /// The layers, lowest first.
    pub(crate) layers: Vec<LayerHeader>,
    pub(crate) map: BlockMap,
    /// Whether the top layer takes writes.
    pub(crate) writable: bool,
    /// Whether a flush must make the top layer durable.
    pub(crate) durable: bool,
    /// The room of the top layer on its host; `None` for a layer that outlives its machine.
    pub(crate) room: Option<Room>,
    /// The leaves of the map that are outdated in the top layer's file.
    pub(crate) dirty: BTreeSet<u64>,
    /// The blocks that requests in flight are adding to the top layer. Another change of them
    /// waits, because it might copy up bytes that the first is about to replace.
    locks: Vec<Range<u64>>,
    /// The changes that wait for locked blocks.
    pub(crate) waiting: VecDeque<(u64, Request)>,
}

/// A write into the top layer: whole blocks where the layer did not hold them before.
pub(crate) struct WritePlan {
    /// The bytes to copy up before the written ones.
    pub(crate) before: Range<u64>,
    /// The bytes to copy up after the written ones.
    pub(crate) after: Range<u64>,
}

impl Stack {
    /// A stack of `layers` with their merged `map`.
    pub(crate) fn new(has_base: bool, layers: Vec<LayerHeader>, map: BlockMap) -> Self {
        Self {
            has_base,
            layers,
            map,
            writable: false,
            durable: false,
            room: None,
            dirty: BTreeSet::new(),
            locks: Vec::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Checks that a layer with `header` fits on top of these layers, over a base of `base_size`.
    pub(crate) fn check_next(
        layers: &[LayerHeader],
        base_size: u64,
        header: &LayerHeader,
    ) -> Result<(), DiskError> {
        let below = layers.last();
        let (size, parent) = below.map_or((base_size, None), |h| (h.virtual_size, Some(h.id)));
        if layers.len() == MAX_LAYERS {
            return Err(DiskError::Mismatch(format!(
                "more than {MAX_LAYERS} layers"
            )));
        }
        if header.parent != parent {
            let name = |id: Option<LayerId>| id.map_or("no layer".to_owned(), |id| id.to_string());
            return Err(DiskError::Mismatch(format!(
                "layer {} was made over {}, not over {}",
                header.id,
                name(header.parent),
                name(parent)
            )));
        }
        if header.virtual_size < size {
            return Err(DiskError::Mismatch(format!(
                "layer {} has {} bytes, what it lies on {size}",
                header.id, header.virtual_size
            )));
        }
        if below.is_some_and(|below| below.block_size != header.block_size) {
            return Err(DiskError::Mismatch(format!(
                "layer {} has another block size than the one below",
                header.id
            )));
        }
        Ok(())
    }

    /// The top layer's header. A stack has at least one layer.
    pub(crate) fn top(&self) -> &LayerHeader {
        &self.layers[self.layers.len() - 1]
    }

    /// The top layer's number, which is also its target.
    pub(crate) fn top_number(&self) -> u8 {
        // `check_next` keeps the number of layers below 254.
        self.layers.len() as u8
    }

    fn block_size(&self) -> u64 {
        u64::from(self.top().block_size)
    }

    /// The blocks that `bytes` touch.
    pub(crate) fn blocks(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start / self.block_size()..bytes.end.div_ceil(self.block_size())
    }

    /// The blocks that lie wholly in `bytes`, the end of the disk counting as the end of a block.
    pub(crate) fn whole_blocks(&self, bytes: &Range<u64>) -> Range<u64> {
        let end = if bytes.end == self.top().virtual_size {
            bytes.end.div_ceil(self.block_size())
        } else {
            bytes.end / self.block_size()
        };
        bytes.start.div_ceil(self.block_size()).min(end)..end
    }

    /// The bytes of `blocks`.
    pub(crate) fn bytes(&self, blocks: &Range<u64>) -> Range<u64> {
        blocks.start * self.block_size()..blocks.end * self.block_size()
    }

    /// The position of `offset` in the file of layer `number`.
    pub(crate) fn layer_offset(&self, number: u8, offset: u64) -> u64 {
        self.layers[usize::from(number) - 1].data_offset() + offset
    }

    /// Adds the ops that read `buffers` from `offset`, and fills buffers that are zero.
    pub(crate) fn plan_read(&self, offset: u64, buffers: &Buffers, ops: &mut Vec<Op>) {
        let end = offset + buffers.len();
        let mut at = offset;
        while at < end {
            let (owner, count) = self.map.run(self.blocks(&(at..end)));
            let first = at / self.block_size();
            let stop = ((first + count) * self.block_size()).min(end);
            let part = buffers.range(at - offset, stop - at);
            let (target, target_offset) = match owner {
                Owner::Base if self.has_base => (0, at),
                Owner::Layer(number) => (usize::from(number), self.layer_offset(number, at)),
                Owner::Base | Owner::Zero { .. } => {
                    part.fill_zero();
                    at = stop;
                    continue;
                }
            };
            ops.push(Op {
                target,
                offset: target_offset,
                kind: OpKind::Read(part),
            });
            at = stop;
        }
    }

    /// The bytes that a write of `bytes` must copy up: the rest of its first and last block, if the
    /// top layer does not hold them.
    pub(crate) fn plan_write(&self, bytes: Range<u64>) -> WritePlan {
        let whole = self.bytes(&self.blocks(&bytes));
        let absent =
            |byte: u64| self.map.owner(byte / self.block_size()) != Owner::Layer(self.top_number());
        let before = if absent(bytes.start) {
            whole.start
        } else {
            bytes.start
        };
        let after = if absent(bytes.end - 1) {
            whole.end
        } else {
            bytes.end
        };
        WritePlan {
            before: before..bytes.start,
            after: bytes.end..after,
        }
    }

    /// Adds the ops that free the space of `blocks` that the top layer holds.
    pub(crate) fn plan_punch(&self, blocks: Range<u64>, ops: &mut Vec<Op>) {
        let top = self.top_number();
        let mut block = blocks.start;
        while block < blocks.end {
            let (owner, count) = self.map.run(block..blocks.end);
            if owner == Owner::Layer(top) {
                let bytes = self.bytes(&(block..block + count));
                ops.push(Op {
                    target: usize::from(top),
                    offset: self.layer_offset(top, bytes.start),
                    kind: OpKind::Discard {
                        len: bytes.end - bytes.start,
                    },
                });
            }
            block += count;
        }
    }

    /// Whether the top layer holds all of `blocks`.
    pub(crate) fn top_holds(&self, blocks: Range<u64>) -> bool {
        self.map.all_owned(blocks, Owner::Layer(self.top_number()))
    }

    /// Counts a write into the top layer against its room. Blocks that the layer already holds do
    /// not count.
    pub(crate) fn take_room(&mut self, bytes: &Range<u64>) -> io::Result<()> {
        let blocks = self.blocks(bytes);
        let whole = self.bytes(&blocks);
        match &mut self.room {
            Some(room)
                if !self
                    .map
                    .all_owned(blocks, Owner::Layer(self.layers.len() as u8)) =>
            {
                room.take(whole.end - whole.start)
            }
            _ => Ok(()),
        }
    }

    /// Assigns `blocks` to `owner`, and marks the top layer's map as outdated.
    pub(crate) fn give(&mut self, blocks: Range<u64>, owner: Owner) {
        if self.map.all_owned(blocks.clone(), owner) {
            return;
        }
        self.dirty
            .extend(blocks.start / LEAF_BLOCKS..blocks.end.div_ceil(LEAF_BLOCKS));
        self.map.set(blocks, owner);
    }

    /// Whether a change in flight holds some of `blocks`.
    pub(crate) fn is_locked(&self, blocks: &Range<u64>) -> bool {
        self.locks
            .iter()
            .any(|lock| lock.start < blocks.end && blocks.start < lock.end)
    }

    /// Locks `blocks`, which must not be locked.
    pub(crate) fn lock(&mut self, blocks: Range<u64>) {
        self.locks.push(blocks);
    }

    /// Undoes [`Stack::lock`].
    pub(crate) fn unlock(&mut self, blocks: &Range<u64>) {
        if let Some(index) = self.locks.iter().position(|lock| lock == blocks) {
            self.locks.swap_remove(index);
        }
    }
}
