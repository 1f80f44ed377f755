//! Takes a checkpoint of the VM while it runs.
//!
//! It is a snapshot ([`super::snapshot`]) whose layers are kept here: memory is copied while the
//! guest runs, over the layers of the last checkpoint, and then the guest is paused for the rest.
//! The number of layers over each other is bounded, for memory by the tracker, which begins a new
//! pile, and for disks by merging the layers that are frozen already.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use clone_api::checkpoints::{CheckpointInfo, CheckpointTaken, NewCheckpoint};
use clone_api::control::SnapshotTimes;
use clone_api::{ApiError, ErrorCode};
use clone_disk::LayerHeader;
use clone_memory::{Checksums, Layer, LayerStack, LayerWriter};
use clone_start::error::{Result, storage_failed};
use clone_vmm::machine::MachineState;

use super::capture::{Stopwatch, copy_running, no_copy, no_tracking, stop_and_copy};
use super::checkpoints::{Checkpoint, CheckpointDisk};
use super::machine::locked;
use super::snapshot::{DiskWrites, SharedSnapshotSource, SnapshotDisk, SnapshotSource, exclusive};

/// The most layers of a disk over those of the VM's parent. With more, they are merged into one.
const MAX_DISK_LAYERS: usize = 16;

/// The files of one disk.
struct DiskFiles {
    /// Takes the guest's writes from now on.
    new_top: File,
    /// For merging older layers, if that is due.
    merged: File,
}

/// Older layers of a disk, merged.
struct Merged {
    file: File,
    header: LayerHeader,
}

/// Takes a checkpoint. The guest continues to run even if that fails.
pub(super) fn take(
    source: &SharedSnapshotSource,
    new: &NewCheckpoint,
    files: Vec<OwnedFd>,
) -> Result<CheckpointTaken> {
    let mut source = exclusive(source)?;
    locked(&source.machine).check_custody()?;
    source.checkpoints.check_new(&new.name)?;
    for (index, disk) in source.disks.iter().enumerate() {
        if disk.writes == DiskWrites::Kept {
            return Err(written_in_place(index));
        }
    }
    let mut files = files.into_iter().map(File::from);
    let memory = files.next();
    let mut disks = Vec::new();
    for disk in &source.disks {
        disks.push(match disk.writes {
            DiskWrites::Layer => match (files.next(), files.next()) {
                (Some(new_top), Some(merged)) => Some(DiskFiles { new_top, merged }),
                _ => return Err(wrong_files()),
            },
            DiskWrites::Refused | DiskWrites::Kept => None,
        });
    }
    let (Some(memory), None) = (memory, files.next()) else {
        return Err(wrong_files());
    };
    let was_running = locked(&source.machine).is_running();
    let had_any = !source.checkpoints.is_empty();
    let taken = source.checkpoint(new, memory, disks);
    if taken.is_err() && !had_any {
        source.dirty_tracker.forget_position();
    }
    if taken.is_err() && was_running {
        locked(&source.machine).resume()?;
    }
    taken
}

impl SnapshotSource {
    fn checkpoint(
        &mut self,
        new: &NewCheckpoint,
        memory_file: File,
        disk_files: Vec<Option<DiskFiles>>,
    ) -> Result<CheckpointTaken> {
        let mut times = SnapshotTimes::default();
        let mut watch = Stopwatch::start();
        let memory = Arc::clone(self.dirty_tracker.memory());
        self.dirty_tracker.begin_position().map_err(no_tracking)?;
        let (below, pages) = self.dirty_tracker.checkpoint_base();
        let parent = below.last().map(Layer::id);
        let mut writer = LayerWriter::new(memory_file, new.name.as_str(), *memory.layout(), parent)
            .map_err(no_copy)?;
        let mut disks = Vec::new();
        for (disk, files) in self.disks.iter().zip(disk_files) {
            disks.push(match files {
                Some(files) => Some((files.new_top, merge(disk, files.merged)?)),
                None => None,
            });
        }
        copy_running(&mut self.dirty_tracker, &mut writer, pages)?;
        watch.lap(&mut times.copy_us);

        let machine = Arc::clone(&self.machine);
        let mut machine = locked(&machine);
        let was_running = machine.is_running();
        let saved = stop_and_copy(
            &mut machine,
            &mut self.dirty_tracker,
            &mut writer,
            &mut times,
        );
        let mut freezing = Stopwatch::start();
        let frozen = saved.and_then(|state| Ok((state, self.freeze_points(disks)?)));
        freezing.lap(&mut times.freeze_us);
        if was_running {
            machine.resume()?;
        }
        drop(machine);
        watch.lap(&mut times.pause_us);
        let (state, (disks, disk_bytes)) = frozen?;

        let memory_bytes = writer.data_bytes();
        let layer = writer.finish(Checksums::Transient).map_err(no_copy)?;
        let info = CheckpointInfo {
            name: new.name.clone(),
            parent: self.checkpoints.present().cloned(),
            created_unix_ms: clone_base::clock::unix_ms(),
            memory_bytes,
            disk_bytes,
        };
        self.keep(info.clone(), new.has_agent, state, (below, layer), disks)?;
        watch.lap(&mut times.finish_us);
        Ok(CheckpointTaken {
            checkpoint: info,
            times,
        })
    }

    fn keep(
        &mut self,
        info: CheckpointInfo,
        has_agent: bool,
        state: MachineState,
        (below, layer): (Vec<Layer>, Layer),
        disks: Vec<Option<CheckpointDisk>>,
    ) -> Result<()> {
        let mut layers = below;
        layers.push(layer);
        let memory = LayerStack::new(layers).map_err(|error| ApiError::internal(&error))?;
        self.dirty_tracker.checkpointed(memory.clone());
        self.checkpoints.add(Checkpoint {
            info,
            has_agent,
            state,
            memory,
            mapped: self.dirty_tracker.memory().layers().cloned(),
            disks,
        });
        Ok(())
    }

    /// Freezes the disks of a paused VM. Returns their contents, and the bytes that were frozen.
    fn freeze_points(
        &self,
        files: Vec<Option<(File, Option<Merged>)>>,
    ) -> Result<(Vec<Option<CheckpointDisk>>, u64)> {
        let failed = |error| storage_failed(&error).advise("make room on that disk");
        let (mut points, mut frozen) = (Vec::new(), 0);
        for (shared, files) in self.disks.iter().zip(files) {
            let mut disk = shared.disk.lock().unwrap_or_else(PoisonError::into_inner);
            let Some((new_top, merged)) = files else {
                points.push(None);
                continue;
            };
            if let Some(Merged { file, header }) = merged {
                let replaced = disk.replace_frozen(shared.parent_layers, header, file);
                replaced.map_err(|error| ApiError::internal(&error))?;
            }
            let is_empty = disk.is_top_empty();
            if !is_empty {
                disk.freeze(new_top, false).map_err(failed)?;
            }
            let point = disk.point().map_err(|error| ApiError::internal(&error))?;
            if !is_empty {
                let top = point.layer_files(shared.parent_layers).last();
                frozen += top.map_or(0, |(_, bytes)| bytes);
            }
            points.push(Some(CheckpointDisk {
                point,
                parent_layers: shared.parent_layers,
            }));
        }
        Ok((points, frozen))
    }
}

/// Merges the frozen layers of a disk over its parent's into `file`, where they are many. The guest
/// runs meanwhile.
fn merge(shared: &SnapshotDisk, file: File) -> Result<Option<Merged>> {
    let disk = shared.disk.lock().unwrap_or_else(PoisonError::into_inner);
    let frozen = disk.layers().len().saturating_sub(1);
    if frozen < shared.parent_layers + MAX_DISK_LAYERS {
        return Ok(None);
    }
    let failed = |error| storage_failed(&error).advise("make room on that disk");
    let layers = disk.frozen(shared.parent_layers).map_err(failed)?;
    drop(disk);
    let header = layers.export(&file).map_err(failed)?;
    Ok(Some(Merged { file, header }))
}

fn written_in_place(index: usize) -> ApiError {
    let message = format!("disk {index} is written in place, so it cannot be set back");
    ApiError::new(ErrorCode::Conflict, message)
        .advise("run VMs that are to have checkpoints with overlay=ephemeral, or the disk with ro")
}

fn wrong_files() -> ApiError {
    let message = "the files that came with the request are not those of the VM's disks";
    ApiError::new(ErrorCode::BadRequest, message)
}
