//! The threads that read and write files, so that no file system holds up the event loop.
//!
//! They are started by the first request, by the event loop's thread, whose rights they inherit.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use clone_fuse::wire::Output;
use rustix::fs::{FallocateFlags, copy_file_range, fallocate, fdatasync, fsync};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Action, RamSlice, SharedFile};

/// The most threads of a share.
const MAX_THREADS: usize = 2;
/// The stack of a thread, in bytes.
const STACK_BYTES: usize = 64 << 10;
/// The most bytes that one request copies between files. The guest asks again for the rest.
const MAX_COPY: u64 = 64 << 20;

/// A request on open files.
pub(super) struct Job {
    pub(super) tag: u64,
    pub(super) file: SharedFile,
    pub(super) other: Option<SharedFile>,
    pub(super) action: Action,
    pub(super) data: Vec<RamSlice>,
}

/// A request that is done.
pub(super) struct Done {
    pub(super) tag: u64,
    pub(super) result: Result<Outcome, Errno>,
}

/// What the guest gets.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// This many bytes were read into the guest's buffers.
    Filled(usize),
    /// A body.
    Body(Vec<u8>),
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    done: Vec<Done>,
    /// The jobs that threads are working on.
    busy: usize,
    threads: usize,
    is_ending: bool,
}

struct Shared {
    state: Mutex<State>,
    /// There is a job, or the end.
    work: Condvar,
    /// A job is done.
    progress: Condvar,
    event: EventFd,
}

/// The threads of a share.
pub(super) struct Workers(Arc<Shared>);

impl Workers {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            progress: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
        })))
    }

    /// Hands a job over.
    pub(super) fn submit(&self, job: Job) -> io::Result<()> {
        let mut state = self.0.lock();
        state.jobs.push_back(job);
        if state.busy + state.jobs.len() > state.threads && state.threads < MAX_THREADS {
            let shared = Arc::clone(&self.0);
            let builder = std::thread::Builder::new().name("share".to_owned());
            let spawned = builder.stack_size(STACK_BYTES).spawn(move || shared.work());
            match spawned {
                Ok(_detached) => state.threads += 1,
                // Others will come to it.
                Err(_) if state.threads > 0 => {}
                Err(error) => {
                    state.jobs.pop_back();
                    return Err(error);
                }
            }
        }
        self.0.work.notify_one();
        Ok(())
    }

    /// Takes what is done.
    pub(super) fn take_done(&self) -> Vec<Done> {
        // Spurious events are allowed.
        let _ = self.0.event.read();
        std::mem::take(&mut self.0.lock().done)
    }

    /// Waits until all jobs are done.
    pub(super) fn drain(&self) {
        let mut state = self.0.lock();
        while state.busy > 0 || !state.jobs.is_empty() {
            state = self
                .0
                .progress
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl AsRawFd for Workers {
    /// Readable when something is done.
    fn as_raw_fd(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.drain();
        self.0.lock().is_ending = true;
        self.0.work.notify_all();
    }
}

impl Shared {
    /// The lock is held for moments, by the event loop's thread and the workers.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                state.busy += 1;
                drop(state);
                let tag = job.tag;
                let result = carry_out(&job);
                // The files may be closed by this, which may take its time.
                drop(job);
                state = self.lock();
                state.busy -= 1;
                state.done.push(Done { tag, result });
                // The counter of an eventfd does not overflow by this.
                let _ = self.event.write(1);
                self.progress.notify_all();
                continue;
            }
            if state.is_ending {
                return;
            }
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn carry_out(job: &Job) -> Result<Outcome, Errno> {
    let file = &job.file;
    match job.action {
        Action::Read { offset, .. } => transfer(job, offset, false, false).map(Outcome::Filled),
        Action::Write { offset, append, .. } => {
            let count = transfer(job, offset, true, append)?;
            Ok(written(count as u64))
        }
        Action::Sync { only_data } => {
            match only_data {
                true => fdatasync(file),
                false => fsync(file),
            }?;
            Ok(Outcome::Body(Vec::new()))
        }
        Action::Allocate { mode, offset, len } => {
            let mode = FallocateFlags::from_bits_retain(mode);
            let known =
                FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
            if !known.contains(mode) {
                return Err(Errno::OPNOTSUPP);
            }
            fallocate(file, mode, offset, len)?;
            Ok(Outcome::Body(Vec::new()))
        }
        Action::Seek { offset, whence } => {
            use rustix::fs::{SeekFrom, seek};
            let to = match whence.cast_signed() {
                libc::SEEK_DATA => SeekFrom::Data(offset),
                libc::SEEK_HOLE => SeekFrom::Hole(offset),
                _ => return Err(Errno::INVAL),
            };
            let mut body = Output::new();
            body.u64(seek(file, to)?);
            Ok(Outcome::Body(body.into_bytes()))
        }
        Action::Copy { from, to, len } => {
            let other = job.other.as_ref().ok_or(Errno::BADF)?;
            let (mut from, mut to) = (from, to);
            let len = len.min(MAX_COPY) as usize;
            let count = copy_file_range(file, Some(&mut from), other, Some(&mut to), len)?;
            Ok(written(count as u64))
        }
    }
}

/// `struct fuse_write_out`.
fn written(count: u64) -> Outcome {
    let mut body = Output::new();
    // A request has less than 4 GiB.
    body.u32(u32::try_from(count).unwrap_or(u32::MAX)).u32(0);
    Outcome::Body(body.into_bytes())
}

/// Reads or writes the guest's buffers.
fn transfer(job: &Job, offset: u64, write: bool, append: bool) -> Result<usize, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    let slices: Vec<libc::iovec> = job
        .data
        .iter()
        .map(|slice| libc::iovec {
            iov_base: slice.address.cast(),
            iov_len: slice.len,
        })
        .collect();
    if slices.is_empty() {
        return Ok(0);
    }
    let (file, count) = (job.file.as_raw_fd(), slices.len() as libc::c_int);
    loop {
        let result = if write {
            let flags = if append { libc::RWF_APPEND } else { 0 };
            // SAFETY: the slices are guest RAM, which stays mapped until the job is done
            // (`RamSlice`); the kernel only reads it.
            unsafe { libc::pwritev2(file, slices.as_ptr(), count, offset, flags) }
        } else {
            // SAFETY: the slices are guest RAM, which stays mapped until the job is done
            // (`RamSlice`), and which no Rust reference covers.
            unsafe { libc::preadv2(file, slices.as_ptr(), count, offset, 0) }
        };
        if result >= 0 {
            return Ok(result.cast_unsigned());
        }
        match Errno::from_io_error(&io::Error::last_os_error()) {
            Some(Errno::INTR) => {}
            error => return Err(error.unwrap_or(Errno::IO)),
        }
    }
}
