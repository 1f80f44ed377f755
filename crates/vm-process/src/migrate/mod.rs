//! Moves the VM to another host, or takes in one that another host sends.
//!
//! Both ends work in a thread of their own, over a stream that came with a request of the control
//! socket: the launchers on both sides have connected it, and the process itself has no network. The
//! thread carries the migration to its end, whatever becomes of the launcher. Which of the two
//! processes may run the guest is the [`Custody`](clone_api::control::Custody) of their machines,
//! which changes here alone; [`clone_migration`] tells by which words.

mod pace;
mod receive;
mod send;
mod word;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clone_api::control::{CpuFeatures, MigrationProgress, MigrationRequest};
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_migration::{Link, MigrationError};
use clone_start::error::Result;
use clone_vmm::machine::{Exit, ExitSignal};

use super::control::Responder;
use super::snapshot::SharedSnapshotSource;
use super::threads::work_apart;

use receive::Arrival;
use send::Moved;
pub(super) use word::{cancel, confirm};

/// The longest time without progress while the guest runs at the source.
const PATIENCE: Duration = Duration::from_secs(60);

/// The part of a migration that other threads look at.
#[derive(Debug, Default)]
pub(super) struct Migration {
    /// How far the migration is that is going on. Each side holds the lock for an assignment.
    progress: Mutex<Option<MigrationProgress>>,
    /// The CPU features that the guest sees, if it was not booted here. Locked as `progress` is.
    cpu: Mutex<Option<CpuFeatures>>,
}

impl Migration {
    /// The migration state of a guest that sees these CPU features; `None` for one that was booted here.
    pub(super) fn new(cpu: Option<CpuFeatures>) -> Self {
        Self {
            progress: Mutex::default(),
            cpu: Mutex::new(cpu),
        }
    }

    pub(super) fn progress(&self) -> Option<MigrationProgress> {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn cpu(&self) -> Option<CpuFeatures> {
        let cpu = self.cpu.lock().unwrap_or_else(PoisonError::into_inner);
        cpu.clone()
    }

    fn set_progress(&self, progress: Option<MigrationProgress>) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }

    fn set_cpu(&self, cpu: CpuFeatures) {
        *self.cpu.lock().unwrap_or_else(PoisonError::into_inner) = Some(cpu);
    }
}

/// Moves the VM over the stream in `files`, in a thread that answers by `responder`. A VM that has
/// gone ends this process.
pub(super) fn send(
    snapshot_source: SharedSnapshotSource,
    migration: Arc<Migration>,
    request: MigrationRequest,
    files: Vec<OwnedFd>,
    responder: Responder,
    exit: ExitSignal,
) {
    work_apart("migration", move || {
        match send::send(&snapshot_source, &migration, &request, files) {
            Moved::Away(done) => responder.answer_last(Ok(done), move || exit.send(Exit::Killed)),
            Moved::Not(error) => {
                responder.answer::<()>(Err(error));
                // A reboot may have waited.
                exit.notify();
            }
        }
    });
}

/// Takes in the VM that comes over the stream in `files`, in a thread that answers by `responder`. If
/// it does not come, this process ends.
pub(super) fn receive(
    snapshot_source: SharedSnapshotSource,
    migration: Arc<Migration>,
    config: VmConfig,
    files: Vec<OwnedFd>,
    responder: Responder,
    exit: ExitSignal,
) {
    work_apart("migration", move || {
        match receive::receive(&snapshot_source, &migration, &config, files) {
            Arrival::Runs(received) => responder.answer(Ok(received)),
            Arrival::Waits(error) => responder.answer::<()>(Err(error)),
            Arrival::Discarded(error) => {
                responder.answer_last::<()>(Err(error), move || exit.send(Exit::Killed));
            }
        }
    });
}

/// Takes the two ends of the stream out of the files that came with a request.
fn link(files: &mut impl Iterator<Item = OwnedFd>) -> Result<Link> {
    let (Some(input), Some(output)) = (files.next(), files.next()) else {
        let message = "the stream to the other host did not come with the request";
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    };
    Link::new(input, output, PATIENCE).map_err(|error| ApiError::internal(&error))
}

fn failed(error: MigrationError) -> ApiError {
    let code = match &error {
        MigrationError::Stream { .. } | MigrationError::Refused(_) => ErrorCode::Unavailable,
        MigrationError::Wire(_) => ErrorCode::BadRequest,
        MigrationError::Memory { .. } => ErrorCode::Internal,
        MigrationError::Disk { .. } => ErrorCode::OutOfSpace,
    };
    ApiError {
        code,
        ..ApiError::internal(&error)
    }
}
