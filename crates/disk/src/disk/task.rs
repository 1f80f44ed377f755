//! Requests in flight: how many ops each waits for, and what it does next.

use std::io;
use std::ops::Range;

use crate::buffer::{Buffers, Owned};

/// A request in flight.
pub(crate) struct Task {
    pub(crate) tag: u64,
    /// Ops of the present stage that are not over.
    pub(crate) pending: u32,
    /// The first error.
    pub(crate) error: Option<io::Error>,
    pub(crate) work: Work,
}

/// What a request in flight is about.
pub(crate) enum Work {
    /// Its ops are all there is.
    Once,
    /// A change of a stack.
    Change(Change),
    /// A flush of a stack's top layer, for itself and all that came before it was started.
    Flush(FlushPass),
}

/// A change of a stack: writes (with what they copy up), and blocks made zero.
pub(crate) struct Change {
    /// The blocks locked for it.
    pub(crate) locked: Option<Range<u64>>,
    pub(crate) writes: Vec<Piece>,
    pub(crate) zero: Range<u64>,
    /// Whether the copies have been read and the writes are under way.
    pub(crate) writing: bool,
}

/// A write of contiguous bytes into the top layer.
pub(crate) struct Piece {
    /// The bytes of the disk, with what is copied up.
    pub(crate) bytes: Range<u64>,
    pub(crate) before: Owned,
    pub(crate) buffers: Buffers,
    pub(crate) after: Owned,
}

/// The stages of a flush, in the order that makes it crash-safe.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlushStage {
    /// Data is made durable.
    Data,
    /// The map is written.
    Map,
    /// The map is made durable.
    Seal,
}

/// A flush under way.
pub(crate) struct FlushPass {
    pub(crate) stage: FlushStage,
    /// Other flushes that this one answers.
    pub(crate) others: Vec<u64>,
    /// The leaves to write, as they were when it started: what the map says of later writes may
    /// not be durable yet.
    pub(crate) leaves: Vec<(u64, Owned)>,
}

/// The requests in flight, by slot; a slot is the number of all ops of its request.
#[derive(Default)]
pub(crate) struct Tasks {
    slots: Vec<Option<Task>>,
    free: Vec<usize>,
}

impl Tasks {
    /// Stores a task.
    pub(crate) fn insert(&mut self, task: Task) -> usize {
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = Some(task);
            return slot;
        }
        self.slots.push(Some(task));
        self.slots.len() - 1
    }

    /// The task in `slot`.
    pub(crate) fn get_mut(&mut self, slot: usize) -> Option<&mut Task> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Takes the task out of `slot`.
    pub(crate) fn remove(&mut self, slot: usize) -> Option<Task> {
        let task = self.slots.get_mut(slot)?.take();
        if task.is_some() {
            self.free.push(slot);
        }
        task
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}
