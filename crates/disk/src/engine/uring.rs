//! Ops on an io_uring: one system call submits a batch, completions are read from shared memory.
//!
//! The ring's own file descriptor becomes readable when completions wait. Short transfers are
//! submitted again. There are never more ops in flight than the submission queue holds, so the
//! completion queue (twice as long) cannot overflow.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::FallocateFlags;

use super::op::{Op, Progress, Target};
use super::ring::restricted_ring;
use super::{Finished, OpId};
use crate::op_kind::OpKind;

/// The most ops in flight at once; more wait in a backlog.
const ENTRIES: u32 = 64;

/// An op in flight, whose array of buffers the kernel uses.
struct Flight {
    id: OpId,
    op: Op,
}

/// The ring of a disk.
pub(crate) struct Uring {
    ring: IoUring,
    /// File descriptors of the disk's targets; -1 for those that are not plain files.
    files: Vec<RawFd>,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    backlog: VecDeque<(OpId, Op)>,
    /// Whether the submission queue has entries that were not submitted.
    unsubmitted: bool,
}

impl Uring {
    /// Makes a ring; fails if the host does not allow one.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            ring: restricted_ring(ENTRIES)?,
            files: Vec::new(),
            flights: (0..ENTRIES).map(|_| None).collect(),
            free: (0..ENTRIES as usize).rev().collect(),
            backlog: VecDeque::new(),
            unsubmitted: false,
        })
    }

    /// Sets the disk's files. No op may be in flight.
    ///
    /// The files are not registered with the kernel, since a ring releases registered files some
    /// time after its process has ended, and with them locks that the next process needs.
    pub(crate) fn set_targets(&mut self, targets: &[Target]) {
        assert!(self.is_idle(), "files changed under ops in flight");
        self.files = targets
            .iter()
            .map(|target| match target {
                Target::File(file) => file.as_raw_fd(),
                Target::Qcow2(_) => -1,
            })
            .collect();
    }

    /// Whether nothing is in flight or waiting.
    pub(crate) fn is_idle(&self) -> bool {
        self.free.len() == self.flights.len() && self.backlog.is_empty()
    }

    /// Queues an op; [`Uring::kick`] submits it.
    pub(crate) fn push(&mut self, id: OpId, op: Op) {
        self.backlog.push_back((id, op));
    }

    /// Submits the queued ops, as far as the ring has room.
    pub(crate) fn kick(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// Submits the queued ops and waits until one is complete.
    pub(crate) fn kick_and_wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        self.fill();
        if !self.unsubmitted && want == 0 {
            return Ok(());
        }
        loop {
            let outcome = self.ring.submit_and_wait(want);
            match outcome {
                Ok(_) => {
                    self.unsubmitted = !self.ring.submission().is_empty();
                    if !self.unsubmitted {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory for requests. When a request in flight completes,
                // there is room again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    self.unsubmitted = true;
                    if self.ring.completion().is_empty() {
                        std::thread::yield_now();
                        continue;
                    }
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Moves ops from the backlog into the submission queue.
    fn fill(&mut self) {
        while let Some(slot) = self.free.pop() {
            let Some((id, op)) = self.backlog.pop_front() else {
                self.free.push(slot);
                return;
            };
            // The op is stored first: the entry points to the array in it, whose heap memory does
            // not move while the op stays in its slot.
            let flight = self.flights[slot].insert(Flight { id, op });
            let entry = entry(&flight.op, self.files[flight.op.target]).user_data(slot as u64);
            // SAFETY: the op's array of buffers lives in its slot until its completion is seen,
            // and the buffers as long, as `Buffer::new` was promised.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            // There are as many slots as entries, and the queue is emptied at each submission but
            // for entries that the kernel had no room for, which hold slots too.
            assert!(pushed.is_ok(), "submission queue shorter than the slots");
            self.unsubmitted = true;
        }
    }

    /// Takes the waiting completions, without a system call unless an op must continue.
    pub(crate) fn reap(&mut self, finished: &mut Vec<Finished>) -> io::Result<()> {
        let Self {
            ring,
            flights,
            free,
            backlog,
            ..
        } = self;
        for completion in ring.completion() {
            let slot = completion.user_data() as usize;
            let Some(Flight { id, op }) = flights[slot].take() else {
                continue;
            };
            free.push(slot);
            let result = completion.result();
            // The conversion fails only for a negative result, which is an error number.
            let outcome = u64::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            match op.progress(outcome) {
                Ok(Progress::Again(rest)) => backlog.push_front((id, rest)),
                Ok(Progress::Done) => finished.push((id, Ok(()))),
                Err(error) => finished.push((id, Err(error))),
            }
        }
        if self.backlog.is_empty() && !self.unsubmitted {
            return Ok(());
        }
        self.kick()
    }
}

impl AsRawFd for Uring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// The submission entry of `op` on the file descriptor `fd`.
fn entry(op: &Op, fd: RawFd) -> squeue::Entry {
    let fd = types::Fd(fd);
    match &op.kind {
        OpKind::Read(buffers) => {
            let (iovecs, count) = buffers.iovecs();
            opcode::Readv::new(fd, iovecs, count as u32)
                .offset(op.offset)
                .build()
        }
        OpKind::Write(buffers) | OpKind::Fill { buffers, .. } => {
            let (iovecs, count) = buffers.iovecs();
            opcode::Writev::new(fd, iovecs, count as u32)
                .offset(op.offset)
                .build()
        }
        OpKind::Sync => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        OpKind::Zero { .. } | OpKind::Discard { .. } => {
            let (flags, len) = op.fallocate().unwrap_or((FallocateFlags::KEEP_SIZE, 0));
            opcode::Fallocate::new(fd, len)
                .offset(op.offset)
                .mode(flags.bits() as i32)
                .build()
        }
    }
}
