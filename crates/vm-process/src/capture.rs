//! Captures a running guest: copies its pages in rounds while it runs, then pauses it, copies the
//! last of them and reads the machine's state.
//!
//! Where the pages go is a [`PageCarrier`]'s affair: a snapshot's layer, or a migration's stream.
//! The disks are handled by those two.

use std::sync::Arc;
use std::time::Instant;

use clone_api::control::SnapshotTimes;
use clone_api::{ApiError, ErrorCode};
use clone_memory::{GuestMemory, LayerWriter, PageSet};
use clone_start::error::{Result, storage_failed};
use clone_vmm::machine::MachineState;

use super::dirty_tracker::DirtyTracker;
use super::machine::{GuestMachine, machine_error};

/// While more than this has changed, the changed pages are copied to a layer once more before the
/// guest is paused.
const SMALL_BYTES: u64 = 1 << 20;
/// The most copies to a layer made while the guest runs, for a guest that writes faster than it is
/// copied.
const ROUNDS: usize = 4;

/// What carries the pages of a guest away while it runs: a file, or a stream.
pub(super) trait PageCarrier {
    /// Copies these pages in their present state; the last copy of a page counts.
    fn copy(&mut self, memory: &GuestMemory, pages: &PageSet) -> Result<()>;

    /// Whether the pages that changed during a round, which is numbered from 0, are copied in one
    /// more while the guest runs. Otherwise they are copied once, and the rest follows in the pause.
    fn wants_another_round(&mut self, round: usize, changed: &PageSet) -> Result<bool>;
}

impl PageCarrier for LayerWriter {
    fn copy(&mut self, memory: &GuestMemory, pages: &PageSet) -> Result<()> {
        Self::copy(self, memory, pages).map_err(no_copy)
    }

    fn wants_another_round(&mut self, round: usize, changed: &PageSet) -> Result<bool> {
        Ok(round + 1 < ROUNDS && changed.bytes() >= SMALL_BYTES)
    }
}

/// Copies `pages` while the guest runs, whose changes are tracked, and those that change meanwhile,
/// until few are left.
pub(super) fn copy_running(
    dirty_tracker: &mut DirtyTracker,
    carrier: &mut impl PageCarrier,
    pages: PageSet,
) -> Result<()> {
    let memory = Arc::clone(dirty_tracker.memory());
    let mut pages = pages;
    for round in 0.. {
        carrier.copy(&memory, &pages)?;
        pages = dirty_tracker.take_changed().map_err(no_tracking)?;
        if !carrier.wants_another_round(round, &pages)? {
            break;
        }
    }
    carrier.copy(&memory, &pages)
}

/// Pauses the guest, copies the last of its pages, and reads the machine's state.
pub(super) fn stop_and_copy(
    machine: &mut GuestMachine,
    dirty_tracker: &mut DirtyTracker,
    carrier: &mut impl PageCarrier,
    times: &mut SnapshotTimes,
) -> Result<MachineState> {
    machine.check_whole()?;
    let mut watch = Stopwatch::start();
    let mut machine = machine.pause().map_err(machine_error)?;
    watch.lap(&mut times.stop_us);
    if machine.exit().is_some() {
        // The guest's next step ends it, so a copy of this state would be of no use.
        let message = "the VM is ending or rebooting";
        return Err(ApiError::new(ErrorCode::Conflict, message).advise("try again after it"));
    }
    let pages = dirty_tracker.take_changed().map_err(no_tracking)?;
    times.last_copy_bytes = pages.bytes();
    carrier.copy(dirty_tracker.memory(), &pages)?;
    watch.lap(&mut times.last_copy_us);
    let state = machine.save().map_err(machine_error)?;
    watch.lap(&mut times.save_us);
    Ok(state)
}

pub(super) fn no_tracking(error: clone_memory::DirtyError) -> ApiError {
    ApiError::new(
        ErrorCode::HostUnsupported,
        format!("cannot find out what the guest has changed: {error}"),
    )
}

pub(super) fn no_copy(error: clone_memory::LayerError) -> ApiError {
    storage_failed(&error).advise("make room where the snapshot goes")
}

/// Measures consecutive stages.
pub(super) struct Stopwatch(Instant);

impl Stopwatch {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    /// Stores the time since the last lap, in microseconds.
    pub(super) fn lap(&mut self, into_us: &mut u64) {
        let now = Instant::now();
        *into_us = now.duration_since(self.0).as_micros() as u64;
        self.0 = now;
    }
}
