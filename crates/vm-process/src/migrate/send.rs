//! The source's side of a migration.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clone_api::control::{
    Custody, MigrationDone, MigrationProgress, MigrationRequest, SnapshotTimes,
};
use clone_api::{ApiError, ErrorCode};
use clone_disk::{DiskError, FrozenLayers};
use clone_memory::layout::PAGE_SIZE;
use clone_memory::{GuestMemory, PageSet};
use clone_migration::{MigrationError, Outgoing};
use clone_start::error::{Result, storage_failed};
use clone_vmm::snapshot;

use super::super::capture::{PageCarrier, copy_running, no_tracking, stop_and_copy};
use super::super::machine::locked;
use super::super::snapshot::{SharedSnapshotSource, SnapshotSource, exclusive};
use super::pace::{Next, Pace};
use super::{Migration, failed, link};

/// The longest time without progress while the guest is paused.
const PAUSED_PATIENCE: Duration = Duration::from_secs(10);
/// The longest time until the other host answers that the guest runs.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// The number of pages between two reports of the progress.
const REPORT_PAGES: u64 = 4096;
/// The size of the pieces in which disks are sent, in bytes.
const DISK_PIECE: usize = 256 << 10;

/// The end of a migration at its source.
pub(crate) enum Moved {
    /// The VM runs on the other host, and this process is of no more use.
    Away(MigrationDone),
    /// The VM goes on here, or waits to be told; the error says which.
    Not(ApiError),
}

/// Moves the VM over the stream that came first among `files`.
pub(crate) fn send(
    snapshot_source: &SharedSnapshotSource,
    migration: &Migration,
    request: &MigrationRequest,
    files: Vec<OwnedFd>,
) -> Moved {
    let moved = try_send(snapshot_source, migration, request, files);
    migration.set_progress(None);
    match moved {
        Ok(done) => Moved::Away(done),
        Err(error) => Moved::Not(error),
    }
}

fn try_send(
    snapshot_source: &SharedSnapshotSource,
    migration: &Migration,
    request: &MigrationRequest,
    files: Vec<OwnedFd>,
) -> Result<MigrationDone> {
    let mut source = exclusive(snapshot_source)?;
    {
        let machine = locked(&source.machine);
        machine.check_custody()?;
        if !machine.is_running() {
            let message = "the VM is paused, and would run on the other host";
            return Err(ApiError::new(ErrorCode::Conflict, message).advise("resume it first"));
        }
    }
    source.check_no_checkpoints()?;
    source.check_base(&request.base)?;
    let mut files = files.into_iter();
    let link = link(&mut files)?;
    let disks = travelling(&source, request, files)?;
    let ram = source.dirty_tracker.memory().layout().size();
    let mut carrier = StreamCarrier::new(
        Outgoing::new(link, ram, request.bytes_per_second),
        migration,
        request.max_pause_ms.map(Duration::from_millis),
    );
    let was_tracked = source.dirty_tracker.is_tracked();
    let started = Instant::now();
    let left = leave(&mut source, &mut carrier, request, disks);
    let paused = match left {
        Ok(paused) => paused,
        Err(error) => {
            // The guest first, then the other side: it must not wait for a connection that hangs.
            source.dirty_tracker.not_kept(was_tracked);
            stay(&source)?;
            carrier.outgoing.abort(&error.message);
            return Err(error);
        }
    };
    // The other side has everything, and this one gives up its right to run.
    let given = give(&mut carrier.outgoing);
    if let Given::Back(error) = given {
        source.dirty_tracker.not_kept(was_tracked);
        stay(&source)?;
        carrier.outgoing.abort(&error.message);
        return Err(error);
    }
    let sent = carrier.outgoing.sent();
    match given {
        Given::Unknown(error) => Err(error),
        _ => Ok(MigrationDone {
            bytes: sent.bytes,
            data_pages: sent.data_pages,
            zero_pages: sent.zero_pages,
            equal_pages: sent.equal_pages,
            disk_bytes: sent.disk_bytes,
            rounds: carrier.rounds,
            pause_us: paused.elapsed().as_micros() as u64,
            total_us: started.elapsed().as_micros() as u64,
        }),
    }
}

/// What became of the VM after the word to run was said.
enum Given {
    /// It runs on the other host.
    Away,
    /// It is this host's, for this reason.
    Back(ApiError),
    /// It is the other host's, unless somebody knows better.
    Unknown(ApiError),
}

fn give(outgoing: &mut Outgoing) -> Given {
    let unknown = |error: MigrationError| {
        let message = format!(
            "the VM was given to the other host, which does not say whether it runs: {error}"
        );
        let advice = "look there; then say `clone migrate --confirm` on both hosts if it is there, \
                      or `clone migrate --cancel` on both if it is not";
        Given::Unknown(ApiError::new(ErrorCode::Timeout, message).advise(advice))
    };
    match outgoing.go() {
        Ok(()) => {}
        Err((false, error)) => return Given::Back(failed(error)),
        Err((true, error)) => return unknown(error),
    }
    outgoing.set_patience(ANSWER_PATIENCE);
    match outgoing.outcome() {
        Ok(None) => Given::Away,
        Ok(Some(reason)) => Given::Back(failed(MigrationError::Refused(reason))),
        Err(error) => unknown(error),
    }
}

/// Lets the guest run here again.
fn stay(source: &SnapshotSource) -> Result<()> {
    let mut machine = locked(&source.machine);
    let set = machine.set_custody(Custody::Here);
    set.map_err(|error| ApiError::internal(&error))?;
    machine.resume()
}

/// A disk whose writes are sent.
struct Travelling {
    index: u32,
    /// The number of its layers that the other host has.
    below: usize,
    /// The layers that take the writes after its first and its second freeze.
    tops: [Option<File>; 2],
}

fn travelling(
    source: &SnapshotSource,
    request: &MigrationRequest,
    files: impl Iterator<Item = OwnedFd>,
) -> Result<Vec<Travelling>> {
    let mut files = files.map(File::from);
    let mut disks = Vec::with_capacity(request.disks.len());
    for &index in &request.disks {
        source.check_disk(index as usize)?;
        disks.push(Travelling {
            index,
            below: request.base.disks[index as usize] as usize,
            tops: [files.next(), files.next()],
        });
    }
    let complete = disks
        .iter()
        .all(|disk| disk.tops.iter().all(Option::is_some));
    match complete && files.next().is_none() {
        true => Ok(disks),
        false => {
            let message = "two files are to come for each disk, after the stream";
            Err(ApiError::new(ErrorCode::BadRequest, message))
        }
    }
}

/// Sends everything, and pauses the guest for the last of it. Returns the moment of the pause, when
/// the other side is ready to run.
fn leave(
    source: &mut SnapshotSource,
    carrier: &mut StreamCarrier<'_>,
    request: &MigrationRequest,
    mut disks: Vec<Travelling>,
) -> Result<Instant> {
    let frozen = freeze_running(source, &mut disks)?;
    send_disks(carrier, frozen)?;
    let memory_base = request.base.memory as usize;
    source.dirty_tracker.begin().map_err(no_tracking)?;
    let pages = source.dirty_tracker.changed_since(memory_base);
    copy_running(&mut source.dirty_tracker, carrier, pages)?;
    // What was sent is applied before the guest is paused, so that the pause need not wait for it.
    carrier.outgoing.settle().map_err(failed)?;
    carrier.outgoing.hurry();
    carrier.outgoing.set_patience(PAUSED_PATIENCE);
    carrier.pause();
    let shared = Arc::clone(&source.machine);
    let paused = Instant::now();
    let state = {
        let mut machine = locked(&shared);
        let mut times = SnapshotTimes::default();
        let state = stop_and_copy(&mut machine, &mut source.dirty_tracker, carrier, &mut times)?;
        // Nobody resumes the guest from here on, although the lock is free.
        let set = machine.set_custody(Custody::Moved);
        set.map_err(|error| ApiError::internal(&error))?;
        state
    };
    let frozen = freeze(source, &mut disks, 1)?;
    send_disks(carrier, frozen)?;
    let state = snapshot::encode(&state).map_err(|error| ApiError::internal(&error))?;
    carrier.outgoing.finish(&state).map_err(failed)?;
    Ok(paused)
}

/// Freezes the disks in a short pause of their own, so that most of their content is sent while the
/// guest runs.
fn freeze_running(
    source: &SnapshotSource,
    disks: &mut [Travelling],
) -> Result<Vec<(u32, FrozenLayers)>> {
    if disks.is_empty() {
        return Ok(Vec::new());
    }
    let mut machine = locked(&source.machine);
    let paused = machine.pause();
    let frozen = paused
        .map(drop)
        .map_err(super::super::machine::machine_error)
        .and_then(|()| freeze(source, disks, 0));
    machine.resume()?;
    frozen
}

/// Freezes the disks, and returns what they hold that was not sent yet.
fn freeze(
    source: &SnapshotSource,
    disks: &mut [Travelling],
    time: usize,
) -> Result<Vec<(u32, FrozenLayers)>> {
    let mut frozen = Vec::new();
    for disk in disks {
        let Some(top) = disk.tops[time].take() else {
            continue;
        };
        if let Some(layers) = source.freeze_disk(disk.index, top, disk.below)? {
            frozen.push((disk.index, layers));
        }
        disk.below = source.frozen_layers(disk.index);
    }
    Ok(frozen)
}

fn send_disks(carrier: &mut StreamCarrier<'_>, frozen: Vec<(u32, FrozenLayers)>) -> Result<()> {
    for (index, layers) in frozen {
        let sent: std::result::Result<(), DiskFailure> =
            layers.read(DISK_PIECE, |extent, content| {
                let outgoing = &mut carrier.outgoing;
                match extent.has_data {
                    true => outgoing.send_blocks(index, extent.offset, content)?,
                    false => outgoing.send_zero_blocks(index, extent.offset, extent.len)?,
                }
                Ok(())
            });
        sent.map_err(|error| match error {
            DiskFailure::Disk(error) => storage_failed(&error),
            DiskFailure::Stream(error) => failed(error),
        })?;
    }
    Ok(())
}

/// A disk could not be read, or not be sent.
enum DiskFailure {
    Disk(DiskError),
    Stream(MigrationError),
}

impl From<DiskError> for DiskFailure {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}

impl From<MigrationError> for DiskFailure {
    fn from(error: MigrationError) -> Self {
        Self::Stream(error)
    }
}

/// Carries pages to the other host.
struct StreamCarrier<'a> {
    outgoing: Outgoing,
    migration: &'a Migration,
    pace: Pace,
    rounds: u32,
    progress: MigrationProgress,
    /// When this round began, and how many bytes of memory it sends.
    round: (Instant, u64),
}

impl<'a> StreamCarrier<'a> {
    fn new(outgoing: Outgoing, migration: &'a Migration, max_pause: Option<Duration>) -> Self {
        Self {
            outgoing,
            migration,
            pace: Pace::new(max_pause),
            rounds: 0,
            progress: MigrationProgress::default(),
            round: (Instant::now(), 0),
        }
    }

    fn report(&mut self) {
        self.progress.sent_bytes = self.outgoing.sent().bytes;
        self.migration.set_progress(Some(self.progress));
    }

    fn pause(&mut self) {
        self.progress.paused = true;
        self.report();
    }

    /// How long sending these bytes takes at the speed of this round.
    fn expected(&self, bytes: u64) -> Duration {
        let (begun, round_bytes) = self.round;
        let share = bytes as f64 / (round_bytes.max(1)) as f64;
        let seconds = begun.elapsed().as_secs_f64() * share;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

impl PageCarrier for StreamCarrier<'_> {
    fn copy(&mut self, memory: &GuestMemory, pages: &PageSet) -> Result<()> {
        self.round = (Instant::now(), pages.bytes());
        self.progress.left_bytes = pages.bytes();
        self.report();
        for run in pages.runs() {
            let mut first = run.start;
            while first < run.end {
                let end = run.end.min(first + REPORT_PAGES);
                let sent = self.outgoing.send_pages(memory, first..end);
                sent.map_err(failed)?;
                self.progress.left_bytes -= (end - first) * PAGE_SIZE;
                first = end;
            }
            if self.outgoing.sent().bytes > self.progress.sent_bytes {
                self.report();
            }
        }
        self.report();
        Ok(())
    }

    fn wants_another_round(&mut self, round: usize, changed: &PageSet) -> Result<bool> {
        self.rounds += 1;
        self.progress.round = self.rounds;
        // The speed is that of the other side, and not that of the buffers on the way.
        self.outgoing.settle().map_err(failed)?;
        let bytes = changed.bytes();
        let expected = self.expected(bytes);
        match self.pace.next(round, bytes, expected) {
            Next::Round => Ok(true),
            Next::Pause => Ok(false),
            Next::GiveUp(most) => {
                let message = format!(
                    "the guest writes faster than the other host receives: it would be paused for \
                     {} ms, and at most {} ms are allowed",
                    expected.as_millis(),
                    most.as_millis()
                );
                Err(ApiError::new(ErrorCode::Conflict, message)
                    .advise("allow a longer pause, or try again when the guest writes less"))
            }
        }
    }
}
