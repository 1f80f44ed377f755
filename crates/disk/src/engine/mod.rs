//! The engines that execute ops: an io_uring for plain files where the host allows one, a worker
//! thread for the rest, or the calling thread (command-line tools and tests).

mod op;
pub(crate) mod ring;
mod uring;
mod worker;

use std::io;
use std::os::fd::{AsRawFd, RawFd};

pub(crate) use op::{Op, Target, zeros};
use uring::Uring;
use worker::Worker;

/// The number of an op, which the caller chooses.
pub(crate) type OpId = u64;

/// A finished op and its result.
pub(crate) type Finished = (OpId, io::Result<()>);

/// The kinds of engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring where the host allows it, otherwise like [`EngineKind::Worker`].
    Uring,
    /// A thread with `preadv` and `pwritev`.
    Worker,
    /// Blocking calls in the caller's thread.
    Blocking,
}

/// The engine of one disk.
pub(crate) struct Engine {
    targets: Vec<Target>,
    ring: Option<Uring>,
    worker: Option<Worker>,
    /// Ops that were finished by neither ring nor worker.
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

    /// Replaces the targets; new ones must be plain files. No op may be in flight.
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

    /// Queues an op. It may start only with [`Engine::kick`], or finish immediately.
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

    /// Submits the queued ops in one system call.
    pub(crate) fn kick(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), Uring::kick)
    }

    /// Takes the finished ops, without waiting.
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

    /// Whether no op is in flight, queued, or finished and not taken.
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
    /// Waits for the ops in flight, because they point into memory that is freed next.
    fn drop(&mut self) {
        let mut finished = Vec::new();
        while !self.is_idle() {
            if self.wait().is_err() || self.reap(&mut finished).is_err() {
                // The ring is broken, so its memory is leaked, in case the kernel still uses it.
                std::mem::forget(self.ring.take());
                return;
            }
            finished.clear();
        }
    }
}
