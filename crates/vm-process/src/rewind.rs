//! Sets the VM back to one of its checkpoints, in place: memory, CPUs, board, devices and disks.
//!
//! Of memory, only the pages that can differ are put back, so the time depends on what the guest
//! has changed and not on the size of its memory. Everything that the host may refuse is tried
//! before anything is changed. Should a step fail after that, the guest stays paused until a rewind
//! succeeds: it never runs in a state that is mixed of two.
//!
//! The guest notices a rewind by its generation id, for which its kernel reseeds, by the end of all
//! connections to it, and by the link of its interfaces. Its monotonic clock continues from the
//! checkpoint; the wall clock is set by the agent afterwards.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use clone_api::checkpoints::{CheckpointName, RewindTimes, Rewound};
use clone_api::{ApiError, ErrorCode};
use clone_disk::NewTop;
use clone_memory::layout::PAGE_SIZE;
use clone_memory::{GuestMemory, LayerStack, PageSet, PutBack};
use clone_start::error::{Result, storage_failed};
use clone_vmm::machine::{Exit, PausedMachine};

use super::capture::{Stopwatch, no_tracking};
use super::checkpoints::Checkpoint;
use super::machine::{GuestMachine, locked, machine_error};
use super::snapshot::{DiskWrites, SharedSnapshotSource, SnapshotSource, exclusive};

/// Rewinds the VM. A guest that ran, also before an earlier rewind that failed, runs afterwards.
///
/// # Errors
/// Where nothing was changed, the guest continues. Otherwise it stays paused, which its next resume
/// tells.
pub(super) fn rewind(
    source: &SharedSnapshotSource,
    name: &CheckpointName,
    files: Vec<OwnedFd>,
) -> Result<Rewound> {
    let mut source = exclusive(source)?;
    let source = &mut *source;
    locked(&source.machine).check_custody()?;
    let mut tops = new_tops(source, source.checkpoints.get(name)?, files)?;
    // Most changes are found while the guest runs, so that the pause is short.
    source.dirty_tracker.begin_position().map_err(no_tracking)?;
    let machine = Arc::clone(&source.machine);
    let mut machine = locked(&machine);
    let runs = machine.ran_before_rewind();
    let was_whole = machine.check_whole().is_ok();
    let mut times = RewindTimes::default();
    let mut whole = Stopwatch::start();
    let mut put_back = PutBack::default();
    let rewound = source.set_back(name, &mut machine, &mut tops, &mut times, &mut put_back);
    if let Err(error) = rewound {
        machine.fail_rewind(&error.message);
        // Nothing was changed if the VM is whole.
        if runs && was_whole && machine.check_whole().is_ok() {
            machine.resume()?;
        }
        return Err(match machine.check_whole() {
            Ok(()) => error,
            Err(incomplete) => incomplete,
        });
    }
    if runs {
        machine.resume()?;
    }
    whole.lap(&mut times.pause_us);
    Ok(Rewound {
        checkpoint: name.clone(),
        running: runs,
        has_agent: source.checkpoints.get(name)?.has_agent,
        dropped_bytes: put_back.dropped * PAGE_SIZE,
        read_bytes: put_back.read * PAGE_SIZE,
        times,
    })
}

/// Makes the layers that take the writes to the disks afterwards.
fn new_tops(
    source: &SnapshotSource,
    target: &Checkpoint,
    files: Vec<OwnedFd>,
) -> Result<Vec<Option<NewTop>>> {
    let mut files = files.into_iter().map(File::from);
    let wrong = || {
        let message = "one file for each disk that the guest writes to comes with the request";
        ApiError::new(ErrorCode::BadRequest, message)
    };
    let mut tops = Vec::new();
    for (disk, content) in source.disks.iter().zip(&target.disks) {
        tops.push(match (disk.writes, content) {
            (DiskWrites::Layer, Some(content)) => {
                let top = content.point.new_top(files.next().ok_or_else(wrong)?);
                Some(top.map_err(|error| storage_failed(&error).advise("make room on that disk"))?)
            }
            _ => None,
        });
    }
    match files.next() {
        None => Ok(tops),
        Some(_) => Err(wrong()),
    }
}

impl SnapshotSource {
    fn set_back(
        &mut self,
        name: &CheckpointName,
        machine: &mut GuestMachine,
        tops: &mut [Option<NewTop>],
        times: &mut RewindTimes,
        put_back: &mut PutBack,
    ) -> Result<()> {
        let target = self.checkpoints.get(name)?;
        let runs = machine.ran_before_rewind();
        let mut watch = Stopwatch::start();
        let paused = machine.pause().map_err(machine_error)?;
        check_goes_on(&paused)?;
        watch.lap(&mut times.stop_us);
        let is_mapped = same(self.dirty_tracker.memory().layers(), target.mapped.as_ref());
        let pages = match is_mapped {
            true => self.dirty_tracker.differing_from(&target.memory),
            // Everything is mapped anew, and what lies above is read.
            false => {
                let mapped = target.mapped.as_ref().map_or(0, |it| it.layers().len());
                Ok(target.memory.pages_above(mapped))
            }
        };
        let pages = pages.map_err(no_tracking)?;
        watch.lap(&mut times.find_us);

        // From here on, the guest must not run until all is done.
        machine.begin_rewind(runs);
        let mut paused = machine.pause().map_err(machine_error)?;
        // The guest that asked for it is no more.
        paused.exit_signal().clear_reboot();
        if !is_mapped {
            let memory = paused.renew_memory(target.mapped.as_ref());
            self.dirty_tracker.remapped(memory.map_err(machine_error)?);
        }
        self.dirty_tracker.prepare(&pages).map_err(no_tracking)?;
        *put_back = fill(self.dirty_tracker.memory(), &target.memory, &pages)?;
        let tracked = self.dirty_tracker.rewound(target.memory.clone(), &pages);
        tracked.map_err(no_tracking)?;
        watch.lap(&mut times.memory_us);
        for ((disk, content), top) in self.disks.iter().zip(&target.disks).zip(tops) {
            if let (Some(content), Some(top)) = (content, top.take()) {
                let mut disk = disk.disk.lock().unwrap_or_else(PoisonError::into_inner);
                let set = disk.set_back(&content.point, top);
                set.map_err(|error| ApiError::internal(&error))?;
            }
        }
        watch.lap(&mut times.disks_us);
        let restored = paused.restore(&target.state);
        restored.map_err(|error| machine_error(error.into()))?;
        let generation = clone_base::random::bytes().map_err(|error| ApiError::internal(&error))?;
        paused.set_generation(generation).map_err(machine_error)?;
        watch.lap(&mut times.restore_us);
        self.checkpoints.set_present(name);
        machine.complete_rewind(name);
        Ok(())
    }
}

fn fill(memory: &GuestMemory, target: &LayerStack, pages: &PageSet) -> Result<PutBack> {
    let put = memory.put_back(target, pages);
    put.map_err(|error| ApiError::internal(&error))
}

/// Refuses a VM that is about to end. A guest that only asked for a reboot can be set back.
fn check_goes_on(machine: &PausedMachine<'_>) -> Result<()> {
    match machine.exit() {
        None | Some(Exit::Reboot) => Ok(()),
        Some(_) => Err(ApiError::new(ErrorCode::Conflict, "the VM is ending")),
    }
}

/// Whether these are the same layers.
fn same(one: Option<&LayerStack>, other: Option<&LayerStack>) -> bool {
    let top = |stack: Option<&LayerStack>| stack.map(|it| (it.layers().len(), it.top().id()));
    top(one) == top(other)
}
