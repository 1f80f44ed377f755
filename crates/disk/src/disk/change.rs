//! Changes of a stack: writes with copy-up, discards, zeros.
//!
//! A change that adds blocks to the top layer locks them, reads the bytes to copy up, writes, and
//! only then enters the blocks in the map. Until then, reads return the old content, never a part
//! of the new. Changes of blocks that the top layer already holds take no lock.

use std::ops::Range;

use super::Disk;
use super::stack::Stack;
use super::task::{Change, Piece, Work};
use crate::block_map::Owner;
use crate::buffer::{Buffers, Owned};
use crate::engine::{Op, zeros};
use crate::op_kind::OpKind;
use crate::request::Request;

impl Disk {
    /// Starts a change of a stack, or queues it if its blocks are locked.
    pub(super) fn start_change(&mut self, tag: u64, request: Request) {
        let (Some(stack), Some((offset, len))) = (&mut self.stack, request.range()) else {
            return;
        };
        let bytes = offset..offset + len;
        let blocks = stack.blocks(&bytes);
        if stack.is_locked(&blocks) {
            stack.waiting.push_back((tag, request));
            return;
        }
        let mut ops = Vec::new();
        let mut change = Change {
            locked: None,
            writes: Vec::new(),
            zero: 0..0,
            writing: false,
        };
        match request {
            Request::Write { buffers, .. } => {
                change.writes.push(piece(stack, bytes, buffers, &mut ops));
            }
            Request::WriteZeroes { .. } => {
                change.zero = stack.whole_blocks(&bytes);
                for edge in edges(&bytes, &stack.bytes(&change.zero)) {
                    let len = edge.end - edge.start;
                    change.writes.push(piece(stack, edge, zeros(len), &mut ops));
                }
            }
            // Blocks that are covered only in part keep their content.
            Request::Discard { .. } => change.zero = stack.whole_blocks(&bytes),
            Request::Read { .. } | Request::Flush => return,
        }
        let grown = change
            .writes
            .iter()
            .try_for_each(|piece| stack.take_room(&piece.bytes));
        if let Err(error) = grown {
            self.complete(tag, Err(error));
            return;
        }
        if !change.zero.is_empty() || !stack.top_holds(blocks.clone()) {
            stack.lock(blocks.clone());
            change.locked = Some(blocks);
        }
        self.start(tag, Work::Change(change), ops);
    }

    /// Continues a change after a stage: starts the write, or enters the blocks and answers.
    pub(super) fn change_done(&mut self, slot: usize) {
        let (Some(task), Some(stack)) = (self.tasks.get_mut(slot), &mut self.stack) else {
            return;
        };
        let Work::Change(change) = &mut task.work else {
            return;
        };
        if !change.writing && task.error.is_none() {
            change.writing = true;
            let mut ops = Vec::new();
            for piece in &mut change.writes {
                ops.push(write_op(stack, piece));
            }
            stack.plan_punch(change.zero.clone(), &mut ops);
            return self.stage(slot, ops);
        }
        if task.error.is_none() {
            let top = Owner::Layer(stack.top_number());
            for piece in &change.writes {
                stack.give(stack.blocks(&piece.bytes), top);
            }
            stack.give(change.zero.clone(), Owner::Zero { top: true });
        }
        let mut retry = Default::default();
        if let Some(locked) = &change.locked {
            stack.unlock(locked);
            retry = std::mem::take(&mut stack.waiting);
        }
        if let Some(task) = self.tasks.remove(slot) {
            self.complete(task.tag, task.error.map_or(Ok(()), Err));
        }
        for (tag, request) in retry {
            self.start_change(tag, request);
        }
    }
}

/// The parts of `bytes` before and after `inner`, or all of it if `inner` is empty.
fn edges(bytes: &Range<u64>, inner: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let parts = if inner.is_empty() {
        [bytes.clone(), 0..0]
    } else {
        [
            bytes.start..inner.start,
            inner.end.min(bytes.end)..bytes.end,
        ]
    };
    parts.into_iter().filter(|part| !part.is_empty())
}

/// Makes a write of `buffers` to `bytes`, and the ops that read the bytes to copy up.
fn piece(stack: &Stack, bytes: Range<u64>, buffers: Buffers, ops: &mut Vec<Op>) -> Piece {
    let plan = stack.plan_write(bytes);
    let mut copy = |range: Range<u64>| {
        // The length is at most a block.
        let mut owned = Owned::zeroed((range.end - range.start) as usize);
        stack.plan_read(range.start, &owned.buffers(), ops);
        owned
    };
    Piece {
        bytes: plan.before.start..plan.after.end,
        before: copy(plan.before),
        after: copy(plan.after),
        buffers,
    }
}

fn write_op(stack: &Stack, piece: &mut Piece) -> Op {
    let mut buffers = piece.before.buffers();
    buffers.extend(&piece.buffers);
    buffers.extend(&piece.after.buffers());
    let top = stack.top_number();
    Op {
        target: usize::from(top),
        offset: stack.layer_offset(top, piece.bytes.start),
        kind: OpKind::Write(buffers),
    }
}
