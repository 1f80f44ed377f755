//! A disk: an image, or layers over one, that takes requests and returns completions.
//!
//! Reads and plain writes become ops of the engine at once. Changes of a stack go through
//! `change.rs`, its flushes through `flush.rs`. The protocol of block devices and the choice of a
//! disk's files are handled elsewhere.

mod change;
mod export;
mod flush;
mod freeze;
mod point;
#[cfg(test)]
mod power_cut;
mod stack;
mod task;

use std::io;
use std::os::fd::RawFd;

use crate::buffer::{Buffer, Buffers, invalid_input};
use crate::engine::{Engine, Finished, Op};
use crate::op_kind::OpKind;
use crate::request::{Completion, Request};
pub use export::{FrozenExtent, FrozenLayers};
pub use freeze::NewTop;
pub use point::DiskPoint;
pub(crate) use stack::Stack;
use task::{Task, Tasks, Work};

/// An open disk.
///
/// Requests are [submitted](Disk::submit), started with [`Disk::poll`] and answered by it; when it
/// has no answer yet, one of [`Disk::wake_fds`] becomes readable later. Tools use
/// [`Disk::read_at`] and the like, which wait. Dropping a disk waits for what is in flight.
pub struct Disk {
    // This field is declared first so that it is dropped first: it waits for ops that use the
    // buffers of the tasks.
    engine: Engine,
    tasks: Tasks,
    stack: Option<Stack>,
    size: u64,
    read_only: bool,
    /// The flushes of a stack that wait for the present one.
    flushes: flush::Flushes,
    completions: Vec<Completion>,
    finished: Vec<Finished>,
}

impl Disk {
    /// Makes a disk over an engine; a stack's layers are the engine's targets from 1 on.
    pub(crate) fn new(engine: Engine, stack: Option<Stack>, size: u64, read_only: bool) -> Self {
        Self {
            engine,
            tasks: Tasks::default(),
            stack,
            size,
            read_only,
            flushes: flush::Flushes::default(),
            completions: Vec::new(),
            finished: Vec::new(),
        }
    }

    /// The size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether every change is refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The size of the unit that is cheapest to write, in bytes: a layer's block.
    pub fn block_size(&self) -> u32 {
        let stack = self.stack.as_ref();
        stack.map_or(crate::layer::MIN_BLOCK_SIZE, |stack| stack.top().block_size)
    }

    /// Whether io_uring serves this disk's plain files.
    pub fn uses_ring(&self) -> bool {
        self.engine.uses_ring()
    }

    /// The descriptors that become readable when [`Disk::poll`] should be called. They do not
    /// change while the disk lives.
    pub fn wake_fds(&self) -> Vec<RawFd> {
        self.engine.wake_fds()
    }

    /// Whether no request is in flight and every answer was taken.
    pub fn is_idle(&self) -> bool {
        self.tasks.is_empty() && self.completions.is_empty()
    }

    /// Accepts a request, whose answer has the same `tag`. It starts with the next [`Disk::poll`].
    pub fn submit(&mut self, tag: u64, request: Request) {
        if let Err(error) = self.check(&request) {
            self.complete(tag, Err(error));
            return;
        }
        if request.range().is_some_and(|(_, len)| len == 0) {
            self.complete(tag, Ok(()));
            return;
        }
        match (&mut self.stack, request) {
            (None, request) => self.start_plain(tag, request),
            (Some(stack), Request::Read { offset, buffers }) => {
                let mut ops = Vec::new();
                stack.plan_read(offset, &buffers, &mut ops);
                self.start(tag, Work::Once, ops);
            }
            (Some(_), Request::Flush) => self.start_flush(tag, Vec::new()),
            (Some(_), request) => self.start_change(tag, request),
        }
    }

    /// Starts the submitted requests, in one system call if possible, and appends the available
    /// answers.
    ///
    /// # Errors
    /// The host refuses to take requests. The disk cannot be used any more.
    pub fn poll(&mut self, answers: &mut Vec<Completion>) -> io::Result<()> {
        self.pump()?;
        answers.append(&mut self.completions);
        Ok(())
    }

    /// Waits for all submitted requests.
    ///
    /// # Errors
    /// As for [`Disk::poll`].
    pub fn drain(&mut self, answers: &mut Vec<Completion>) -> io::Result<()> {
        self.pump()?;
        while !self.tasks.is_empty() {
            self.engine.wait()?;
            self.pump()?;
        }
        answers.append(&mut self.completions);
        Ok(())
    }

    /// Reads into `slice` and waits. Nothing else may be in flight.
    ///
    /// # Errors
    /// The host's error, or `InvalidInput` past the end of the disk.
    pub fn read_at(&mut self, slice: &mut [u8], offset: u64) -> io::Result<()> {
        // SAFETY: `slice` is borrowed until `call` returns, which is after the request is over.
        let buffers = unsafe { Buffers::of_slice(slice) };
        self.call(Request::Read { offset, buffers })
    }

    /// Writes `slice` and waits. Nothing else may be in flight.
    ///
    /// # Errors
    /// As for [`Disk::read_at`], and `ReadOnlyFilesystem`.
    pub fn write_at(&mut self, slice: &[u8], offset: u64) -> io::Result<()> {
        // SAFETY: `slice` is borrowed until `call` returns, and a write only reads its buffers.
        let buffer = unsafe { Buffer::new(slice.as_ptr().cast_mut(), slice.len()) };
        let buffers = Buffers::from(vec![buffer]);
        self.call(Request::Write { offset, buffers })
    }

    /// Submits a request and waits for its answer. Nothing else may be in flight.
    ///
    /// # Errors
    /// The error of the request.
    pub fn call(&mut self, request: Request) -> io::Result<()> {
        if !self.is_idle() {
            return Err(io::Error::other(
                "a blocking request among others in flight",
            ));
        }
        self.submit(0, request);
        let mut answers = Vec::new();
        self.drain(&mut answers)?;
        answers.pop().map_or(Ok(()), |answer| answer.result)
    }

    fn check(&self, request: &Request) -> io::Result<()> {
        if request.changes_disk() && self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let inside = request.range().is_none_or(|(offset, len)| {
            offset.checked_add(len).is_some_and(|end| end <= self.size)
        });
        if inside {
            Ok(())
        } else {
            Err(invalid_input("request past the end of the disk"))
        }
    }

    /// A request on an image without layers is one op.
    fn start_plain(&mut self, tag: u64, request: Request) {
        let (offset, kind) = match request {
            // A read-only disk has nothing to make durable, and its file may not allow syncing.
            Request::Flush if self.read_only => return self.complete(tag, Ok(())),
            Request::Read { offset, buffers } => (offset, OpKind::Read(buffers)),
            Request::Write { offset, buffers } => (offset, OpKind::Write(buffers)),
            Request::Flush => (0, OpKind::Sync),
            Request::Discard { offset, len } => (offset, OpKind::Discard { len }),
            Request::WriteZeroes { offset, len, unmap } => {
                (offset, OpKind::Zero { len, punch: unmap })
            }
        };
        let op = Op {
            target: 0,
            offset,
            kind,
        };
        self.start(tag, Work::Once, vec![op]);
    }

    /// Starts a task with the ops of its first stage.
    fn start(&mut self, tag: u64, work: Work, ops: Vec<Op>) {
        let slot = self.tasks.insert(Task {
            tag,
            pending: 0,
            error: None,
            work,
        });
        self.stage(slot, ops);
    }

    /// Starts a stage of the task in `slot`; continues at once if the stage has no ops.
    fn stage(&mut self, slot: usize, ops: Vec<Op>) {
        let Some(task) = self.tasks.get_mut(slot) else {
            return;
        };
        if ops.is_empty() {
            return self.stage_done(slot);
        }
        // A request is split into no more ops than it has blocks.
        task.pending = ops.len() as u32;
        for op in ops {
            self.engine.push(slot as u64, op);
        }
    }

    /// Continues a task after all ops of a stage have finished.
    fn stage_done(&mut self, slot: usize) {
        let Some(task) = self.tasks.get_mut(slot) else {
            return;
        };
        match task.work {
            Work::Once => {
                if let Some(task) = self.tasks.remove(slot) {
                    self.complete(task.tag, task.error.map_or(Ok(()), Err));
                }
            }
            Work::Change(_) => self.change_done(slot),
            Work::Flush(_) => self.flush_stage_done(slot),
        }
    }

    fn complete(&mut self, tag: u64, result: io::Result<()>) {
        self.completions.push(Completion { tag, result });
    }

    /// Starts queued ops and takes finished ones, until there are no more of either.
    fn pump(&mut self) -> io::Result<()> {
        loop {
            self.engine.kick()?;
            let mut finished = std::mem::take(&mut self.finished);
            self.engine.reap(&mut finished)?;
            let moved = !finished.is_empty();
            for (id, result) in finished.drain(..) {
                self.op_done(id as usize, result);
            }
            // The vector is kept to reuse its allocation.
            self.finished = finished;
            if !moved {
                return Ok(());
            }
        }
    }

    fn op_done(&mut self, slot: usize, result: io::Result<()>) {
        let Some(task) = self.tasks.get_mut(slot) else {
            return;
        };
        task.pending -= 1;
        if let Err(error) = result {
            task.error.get_or_insert(error);
        }
        if task.pending == 0 {
            self.stage_done(slot);
        }
    }
}
