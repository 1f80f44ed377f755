//! Executes ops on a separate thread, for images whose calls block (qcow2) and for hosts that
//! forbid io_uring. The thread starts with the first op, and ends after its last op when the worker
//! is dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use super::op::{Op, Target};
use super::{Finished, OpId};

/// The stack size, with room for the qcow2 code, which decompresses clusters. Only touched pages
/// cost memory.
const STACK_BYTES: usize = 256 << 10;

/// The state shared by the disk's thread and the worker.
struct Shared {
    /// The queues. The lock is held only to move ops in and out, never during an op.
    state: Mutex<State>,
    /// Notified when there is work, or when the worker ends.
    work: Condvar,
    /// Notified when an op is finished.
    done: Condvar,
    /// An eventfd that notifies the event loop of finished ops.
    wake: OwnedFd,
}

#[derive(Default)]
struct State {
    queue: VecDeque<(OpId, Op, Target)>,
    finished: Vec<Finished>,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between statements, so a panic elsewhere does not damage it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk's worker thread.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    in_flight: usize,
}

impl Worker {
    /// Makes a worker. Its thread starts with the first op.
    pub(crate) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                work: Condvar::new(),
                done: Condvar::new(),
                wake,
            }),
            thread: None,
            in_flight: 0,
        })
    }

    /// Whether nothing is in flight or unseen.
    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// Hands an op to the thread; an error means that it cannot be started.
    pub(crate) fn push(&mut self, id: OpId, op: Op, target: Target) -> io::Result<()> {
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            self.thread = Some(
                std::thread::Builder::new()
                    .name("disk".to_owned())
                    .stack_size(STACK_BYTES)
                    .spawn(move || serve(&shared))?,
            );
        }
        self.in_flight += 1;
        self.shared.lock().queue.push_back((id, op, target));
        self.shared.work.notify_one();
        Ok(())
    }

    /// Takes the finished ops.
    pub(crate) fn reap(&mut self, finished: &mut Vec<Finished>) {
        // The descriptor is read under the lock, so it is readable exactly while finished ops wait.
        let mut state = self.shared.lock();
        let mut count = [0; 8];
        // The read fails if nothing was written since the last read, which does no harm.
        let _ = rustix::io::read(&self.shared.wake, &mut count);
        self.in_flight -= state.finished.len();
        finished.append(&mut state.finished);
    }

    /// Waits until an op is finished. At least one op must be in flight.
    pub(crate) fn wait(&self) {
        let state = self.shared.lock();
        let waited = self
            .shared
            .done
            .wait_while(state, |state| state.finished.is_empty());
        drop(waited);
    }
}

impl AsRawFd for Worker {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.wake.as_raw_fd()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.take() {
            // Joining fails only if the thread panicked, which cannot be reported here.
            let _ = thread.join();
        }
    }
}

/// The thread's function: executes ops one after the other, in order.
fn serve(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some((id, op, target)) = state.queue.pop_front() {
            drop(state);
            // A panic in the qcow2 code (an image may be hostile) must fail only the request. If it
            // ended this thread, the disk would wait forever.
            let result = catch_unwind(AssertUnwindSafe(|| op.execute(&target)))
                .unwrap_or_else(|_| Err(io::Error::other("the image's driver panicked")));
            state = shared.lock();
            state.finished.push((id, result));
            shared.done.notify_one();
            if state.finished.len() == 1 {
                // The write fails only if the counter is full, and then the event loop is awake
                // anyway.
                let _ = rustix::io::write(&shared.wake, &1u64.to_ne_bytes());
            }
        } else if state.stop {
            return;
        } else {
            state = shared
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
