//! Who carries ops out: an io_uring for plain files where the host allows one, a worker thread for
//! the rest, or the caller itself (command-line tools and tests).

mod op;
pub(crate) mod ring;
mod uring;
mod worker;

use std::io;
use std::os::fd::{AsRawFd, RawFd};

pub(crate) use op::{Op, Target, zeros};
use uring::Uring;
use worker::Worker;

/// An op's number, chosen by who pushes it.
pub(crate) type OpId = u64;

/// An op that is over.
pub(crate) type Finished = (OpId, io::Result<()>);

/// How a disk's input and output is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring where the host allows it, else as [`EngineKind::Worker`].
    Uring,
    /// A thread with `preadv` and `pwritev`.
    Worker,
    /// In the caller's thread, at once.
    Blocking,
}

/// The engine of one disk.
pub(crate) struct Engine {
    targets: Vec<Target>,
    ring: Option<Uring>,
    worker: Option<Worker>,
    /// Finished outside ring and worker.
    finished: Vec<Finished>,
    /// Every op in the order it was pushed, with the bytes it writes.
    #[cfg(test)]
    pub(crate) log: Vec<(Op, Vec<u8>)>,
}

impl Engine {
    /// An engine over `targets`.
    pub(crate) fn new(kind: EngineKind, targets: Vec<Target>) -> io::Result<Self> {
        let ring = match kind {
            EngineKind::Uring => Uring::new()
                .inspect_err(|error| {
                    tracing::info!(%error, "no io_uring on this host: disks use a thread");
                })
                .ok(),
            EngineKind::Worker | EngineKind::Blocking => None,
        };
        let plain = |target: &Target| matches!(target, Target::File(_));
        let by_ring = ring.is_some() && targets.iter().all(plain);
        let worker = if kind == EngineKind::Blocking || by_ring {
            None
        } else {
            Some(Worker::new()?)
        };
        let mut engine = Self {
            targets: Vec::new(),
            ring,
            worker,
            finished: Vec::new(),
            #[cfg(test)]
            log: Vec::new(),
        };
        engine.set_targets(targets);
        Ok(engine)
    }

    /// The targets, in the order of their indices.
    pub(crate) fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Changes the targets; new ones must be plain files. Nothing may be in flight.
    pub(crate) fn set_targets(&mut self, targets: Vec<Target>) {
        if let Some(ring) = &mut self.ring {
            ring.set_targets(&targets);
        }
        self.targets = targets;
    }

    /// Whether the ring serves this engine's files.
    pub(crate) fn uses_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// The descriptors that become readable when [`Engine::reap`] has something to take.
    pub(crate) fn wake_fds(&self) -> Vec<RawFd> {
        let ring = self.ring.as_ref().map(AsRawFd::as_raw_fd);
        let worker = self.worker.as_ref().map(AsRawFd::as_raw_fd);
        ring.into_iter().chain(worker).collect()
    }

    /// Queues an op. It may wait for [`Engine::kick`], and be over at once.
    pub(crate) fn push(&mut self, id: OpId, op: Op) {
        #[cfg(test)]
        self.log.push((op.clone(), op.written()));
        let target = &self.targets[op.target];
        match (target, &mut self.ring, &mut self.worker) {
            (Target::File(_), Some(ring), _) => ring.push(id, op),
            (_, _, Some(worker)) => {
                if let Err(error) = worker.push(id, op, target.clone()) {
                    self.finished.push((id, Err(error)));
                }
            }
            _ => {
                let result = op.execute(target);
                self.finished.push((id, result));
            }
        }
    }

    /// Submits what was queued, in one system call.
    pub(crate) fn kick(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), Uring::kick)
    }

    /// Takes what is over, without waiting.
    pub(crate) fn reap(&mut self, finished: &mut Vec<Finished>) -> io::Result<()> {
        finished.append(&mut self.finished);
        if let Some(worker) = &mut self.worker
            && !worker.is_idle()
        {
            worker.reap(finished);
        }
        self.ring
            .as_mut()
            .map_or(Ok(()), |ring| ring.reap(finished))
    }

    /// Whether nothing is in flight, waiting or unseen.
    pub(crate) fn is_idle(&self) -> bool {
        self.finished.is_empty()
            && self.ring.as_ref().is_none_or(Uring::is_idle)
            && self.worker.as_ref().is_none_or(Worker::is_idle)
    }

    /// Waits until [`Engine::reap`] has something to take, unless nothing is in flight.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        if !self.finished.is_empty() {
            return Ok(());
        }
        match (&mut self.ring, &self.worker) {
            (Some(ring), _) if !ring.is_idle() => ring.kick_and_wait(),
            (_, Some(worker)) if !worker.is_idle() => {
                worker.wait();
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Engine {
    /// Waits for what is in flight, because it points into memory that is freed next.
    fn drop(&mut self) {
        let mut finished = Vec::new();
        while !self.is_idle() {
            if self.wait().is_err() || self.reap(&mut finished).is_err() {
                // The ring is broken: its memory must outlive what the kernel may still do.
                std::mem::forget(self.ring.take());
                return;
            }
            finished.clear();
        }
    }
}
