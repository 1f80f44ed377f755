//! Flushes of a stack's top layer: data, then map, each made durable before the next.
//!
//! There is one flush at a time. Flushes that arrive meanwhile wait and are then answered by one
//! together, since the present one may have missed writes that were complete before they arrived.

use super::Disk;
use super::task::{FlushPass, FlushStage, Work};
use crate::buffer::Owned;
use crate::engine::Op;
use crate::layer::LayerHeader;
use crate::op_kind::OpKind;

/// The flushes that are not answered yet.
#[derive(Default)]
pub(super) struct Flushes {
    under_way: bool,
    waiting: Vec<u64>,
}

impl Disk {
    /// Starts a flush that also answers `others`, or queues it behind the present one.
    pub(super) fn start_flush(&mut self, tag: u64, others: Vec<u64>) {
        let Some(stack) = &mut self.stack else {
            return;
        };
        if !stack.writable || !stack.durable {
            return self.complete(tag, Ok(()));
        }
        if self.flushes.under_way {
            return self.flushes.waiting.push(tag);
        }
        self.flushes.under_way = true;
        let number = stack.top_number();
        let leaves = std::mem::take(&mut stack.dirty)
            .into_iter()
            .map(|index| {
                let bytes = stack.map.top_leaf(index, number);
                (index, Owned::from_bytes(bytes.to_vec()))
            })
            .collect();
        let pass = FlushPass {
            stage: FlushStage::Data,
            others,
            leaves,
        };
        self.start(tag, Work::Flush(pass), vec![sync_op(number)]);
    }

    /// Continues a flush after a stage.
    pub(super) fn flush_stage_done(&mut self, slot: usize) {
        let (Some(task), Some(stack)) = (self.tasks.get_mut(slot), &self.stack) else {
            return;
        };
        let Work::Flush(pass) = &mut task.work else {
            return;
        };
        let number = stack.top_number();
        let ops = match pass.stage {
            _ if task.error.is_some() => Vec::new(),
            FlushStage::Data if !pass.leaves.is_empty() => {
                pass.stage = FlushStage::Map;
                pass.leaves
                    .iter_mut()
                    .map(|(index, leaf)| Op {
                        target: usize::from(number),
                        offset: LayerHeader::leaf_offset(*index),
                        kind: OpKind::Write(leaf.buffers()),
                    })
                    .collect()
            }
            FlushStage::Map => {
                pass.stage = FlushStage::Seal;
                vec![sync_op(number)]
            }
            FlushStage::Data | FlushStage::Seal => Vec::new(),
        };
        if ops.is_empty() {
            self.flush_done(slot);
        } else {
            self.stage(slot, ops);
        }
    }

    /// Answers a flush and starts the next.
    fn flush_done(&mut self, slot: usize) {
        let (Some(task), Some(stack)) = (self.tasks.remove(slot), &mut self.stack) else {
            return;
        };
        let Work::Flush(pass) = task.work else {
            return;
        };
        let result = || match &task.error {
            None => Ok(()),
            Some(error) => Err(error
                .raw_os_error()
                .map_or_else(|| error.kind().into(), std::io::Error::from_raw_os_error)),
        };
        if task.error.is_some() {
            // Leaves that were not written remain dirty.
            stack
                .dirty
                .extend(pass.leaves.iter().map(|(index, _)| index));
        }
        for tag in pass.others.into_iter().chain([task.tag]) {
            self.complete(tag, result());
        }
        self.flushes.under_way = false;
        let mut waiting = std::mem::take(&mut self.flushes.waiting);
        if let Some(tag) = waiting.pop() {
            self.start_flush(tag, waiting);
        }
    }
}

fn sync_op(number: u8) -> Op {
    Op {
        target: usize::from(number),
        offset: 0,
        kind: OpKind::Sync,
    }
}
