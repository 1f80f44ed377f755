//! Takes a snapshot of the VM while it runs.
//!
//! A separate thread copies the pages that differ from the parent while the guest runs, and copies
//! again those that changed meanwhile. Then it pauses the guest, copies the last of them, reads the
//! machine's state, freezes the disks, and resumes the guest. Checksums and the disks' content
//! follow afterwards. So the length of the pause depends not on the size of memory, but on how much
//! the guest writes during the last copy.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use clone_api::control::{
    BaseLayers, DiskTaken, SnapshotKind, SnapshotRequest, SnapshotTaken, SnapshotTimes,
};
use clone_api::{ApiError, ErrorCode};
use clone_disk::{Disk, FrozenLayers};
use clone_memory::{Checksums, LayerWriter};
use clone_start::cpu;
use clone_start::error::{Result, storage_failed};
use clone_vmm::machine::MachineState;
use clone_vmm::snapshot::{self, CpuProfile};

use super::capture::{Stopwatch, copy_running, no_copy, no_tracking, stop_and_copy};
use super::checkpoints::Checkpoints;
use super::dirty_tracker::DirtyTracker;
use super::machine::{GuestMachine, SharedMachine, locked};
use super::open::BootFiles;
use super::run_once::RunOnce;

/// The size of the buffer with which a kernel is copied.
const COPY_BYTES: usize = 1 << 20;

/// A writable disk of the VM.
#[derive(Clone)]
pub(super) struct SnapshotDisk {
    /// The disk, which its device locks for one call at a time.
    pub(super) disk: Arc<Mutex<Disk>>,
    /// The number of the disk's layers that belong to the parent.
    pub(super) parent_layers: usize,
    /// Where the guest's writes to the disk go.
    pub(super) writes: DiskWrites,
}

/// Where the guest's writes to a disk go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskWrites {
    /// The guest only reads the disk.
    Refused,
    /// They go to a layer that ends with the VM.
    Layer,
    /// They go to a file of the owner's, which keeps them.
    Kept,
}

/// The parts of the VM that a snapshot saves.
pub(super) struct SnapshotSource {
    pub(super) machine: SharedMachine,
    pub(super) dirty_tracker: DirtyTracker,
    /// The disks, in the order of the description.
    pub(super) disks: Vec<SnapshotDisk>,
    /// The kernel that the VM boots when it reboots; `None` for a clone whose template has none.
    pub(super) boot: Option<BootFiles>,
    /// The states of the VM that it can be set back to.
    pub(super) checkpoints: Checkpoints,
}

/// The shared source. The thread that takes a snapshot holds the lock, so there is one snapshot at
/// a time.
pub(super) type SharedSnapshotSource = Arc<Mutex<SnapshotSource>>;

/// The files that a snapshot is written to.
struct Files {
    memory: File,
    state: File,
    /// The files for the kernel and the initial RAM disk, if they are requested.
    kernel: Option<(File, File)>,
    /// For each disk: its index, the layer for new writes, and the file for the frozen layers.
    disks: Vec<(u32, File, File)>,
    /// The mark of the saved state that a guest stays paused in.
    mark: Option<File>,
}

impl Files {
    fn sort(request: &SnapshotRequest, files: Vec<OwnedFd>) -> Result<Self> {
        let kernel = if request.kernel { 2 } else { 0 };
        let mark = usize::from(request.stay_paused);
        let wanted = 2 + kernel + 2 * request.disks.len() + mark;
        if files.len() != wanted {
            let message = format!("{} files came with the request, not {wanted}", files.len());
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        let mut files = files.into_iter().map(File::from);
        let mut next = || {
            files
                .next()
                .ok_or_else(|| ApiError::new(ErrorCode::BadRequest, "a file is missing"))
        };
        let (memory, state) = (next()?, next()?);
        let kernel = match request.kernel {
            true => Some((next()?, next()?)),
            false => None,
        };
        let disks = request.disks.iter();
        let disks = disks.map(|&index| Ok((index, next()?, next()?)));
        let disks = disks.collect::<Result<_>>()?;
        Ok(Self {
            memory,
            state,
            kernel,
            disks,
            mark: match request.stay_paused {
                true => Some(next()?),
                false => None,
            },
        })
    }
}

/// Takes a snapshot. The guest continues to run even if the snapshot fails.
pub(super) fn take(
    snapshot_source: &SharedSnapshotSource,
    request: &SnapshotRequest,
    files: Vec<OwnedFd>,
) -> Result<SnapshotTaken> {
    let mut snapshot_source = exclusive(snapshot_source)?;
    locked(&snapshot_source.machine).check_custody()?;
    if request.stay_paused {
        snapshot_source.check_no_checkpoints()?;
    }
    let mut files = Files::sort(request, files)?;
    let mark = files.mark.take().map(RunOnce::new).transpose()?;
    let disks = files.disks.iter().map(|(index, ..)| *index as usize);
    for index in disks {
        snapshot_source.check_disk(index)?;
    }
    let was_tracked = snapshot_source.dirty_tracker.is_tracked();
    let was_running = locked(&snapshot_source.machine).is_running();
    let content = snapshot_source.content(request)?;
    let taken = snapshot_source.take(&content, files);
    if taken.is_err() || !content.becomes_parent {
        snapshot_source.dirty_tracker.not_kept(was_tracked);
    }
    let mut machine = locked(&snapshot_source.machine);
    match (&taken, mark) {
        (Ok(_), Some(mark)) => machine
            .in_saved_state(mark)
            .map_err(|error| ApiError::internal(&error))?,
        _ if was_running => machine.resume()?,
        _ => {}
    }
    drop(machine);
    taken
}

/// Takes the source for a snapshot, a checkpoint, a rewind or a migration; there is one at a time.
pub(super) fn exclusive(
    snapshot_source: &SharedSnapshotSource,
) -> Result<MutexGuard<'_, SnapshotSource>> {
    match snapshot_source.try_lock() {
        Ok(snapshot_source) => Ok(snapshot_source),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => {
            let message =
                "a snapshot or checkpoint of this VM is being taken, or it is rewound or moved";
            Err(ApiError::new(ErrorCode::Conflict, message).advise("try again after it"))
        }
    }
}

/// What a snapshot contains, and what becomes of it.
struct Content {
    /// The number of the parent's memory layers that it builds on.
    memory_base: usize,
    /// The number of layers of each disk that it builds on.
    disk_bases: Vec<usize>,
    /// Whether its memory layer has checksums.
    checksums: Checksums,
    /// Whether it is the parent of the next snapshot.
    becomes_parent: bool,
    /// Whether the guest runs again as soon as everything is read. Otherwise it is resumed, or not,
    /// when everything is written.
    resumes_at_once: bool,
}

/// The data that is read while the guest is paused.
struct Paused {
    state: MachineState,
    frozen: Vec<FrozenDisk>,
}

/// The frozen layers of a disk, and the file that they are written to.
struct FrozenDisk {
    index: u32,
    /// The number of the parent's layers below the frozen ones.
    parent_layers: usize,
    /// `None` if nothing was written since the parent.
    layers: Option<FrozenLayers>,
    file: File,
}

impl SnapshotSource {
    /// What a request asks for.
    fn content(&self, request: &SnapshotRequest) -> Result<Content> {
        let all = self.parent_layers();
        let none = BaseLayers {
            memory: 0,
            disks: vec![0; self.disks.len()],
        };
        if let Some(base) = &request.base {
            self.check_base(base)?;
        }
        let base = match request.kind {
            SnapshotKind::Full => none,
            SnapshotKind::Fork => all,
            SnapshotKind::Diff => request.base.clone().unwrap_or(all),
            SnapshotKind::Save => request.base.clone().unwrap_or(none),
        };
        Ok(Content {
            memory_base: base.memory as usize,
            disk_bases: base.disks.iter().map(|it| *it as usize).collect(),
            checksums: match request.kind {
                SnapshotKind::Fork => Checksums::Transient,
                SnapshotKind::Full | SnapshotKind::Diff | SnapshotKind::Save => Checksums::Yes,
            },
            // The VM may be rewound to before this snapshot, to layers that are not over it.
            becomes_parent: matches!(request.kind, SnapshotKind::Full | SnapshotKind::Diff)
                && self.checkpoints.is_empty(),
            resumes_at_once: !request.stay_paused,
        })
    }

    /// The number of all layers of the parent.
    fn parent_layers(&self) -> BaseLayers {
        let disks = self.disks.iter().map(|it| it.parent_layers as u32);
        BaseLayers {
            memory: self.dirty_tracker.parent_layers() as u32,
            disks: disks.collect(),
        }
    }

    /// Refuses what would lose the checkpoints of the VM.
    pub(super) fn check_no_checkpoints(&self) -> Result<()> {
        match self.checkpoints.is_empty() {
            true => Ok(()),
            false => {
                let message = "the VM has checkpoints, which would be lost with its process";
                Err(ApiError::new(ErrorCode::Conflict, message)
                    .advise("remove them first (`clone checkpoint ls`, `clone checkpoint rm`)"))
            }
        }
    }

    /// Refuses a disk that the VM does not have.
    pub(super) fn check_disk(&self, index: usize) -> Result<()> {
        match index < self.disks.len() {
            true => Ok(()),
            false => {
                let message = format!("the VM has no disk {index}");
                Err(ApiError::new(ErrorCode::InvalidConfig, message))
            }
        }
    }

    /// Refuses layers to build on that the parent does not have.
    pub(super) fn check_base(&self, base: &BaseLayers) -> Result<()> {
        let all = self.parent_layers();
        let mut disks = base.disks.iter().zip(&all.disks);
        let fits = base.memory <= all.memory
            && base.disks.len() == all.disks.len()
            && disks.all(|(base, all)| base <= all);
        match fits {
            true => Ok(()),
            false => {
                let message = "the VM does not have the layers that it is to be a difference from";
                Err(ApiError::new(ErrorCode::BadRequest, message))
            }
        }
    }

    fn take(&mut self, content: &Content, files: Files) -> Result<SnapshotTaken> {
        let mut times = SnapshotTimes::default();
        let mut watch = Stopwatch::start();
        let parent = self.dirty_tracker.layer_id(content.memory_base);
        let memory = Arc::clone(self.dirty_tracker.memory());
        let mut writer =
            LayerWriter::new(files.memory, "memory", *memory.layout(), parent).map_err(no_copy)?;
        self.dirty_tracker.begin().map_err(no_tracking)?;
        let pages = self.dirty_tracker.changed_since(content.memory_base);
        copy_running(&mut self.dirty_tracker, &mut writer, pages)?;
        watch.lap(&mut times.copy_us);

        let machine = Arc::clone(&self.machine);
        let mut machine = locked(&machine);
        let was_running = machine.is_running();
        let paused =
            self.pause_and_read(&mut machine, &mut writer, files.disks, content, &mut times);
        if was_running && (paused.is_err() || content.resumes_at_once) {
            machine.resume()?;
        }
        drop(machine);
        watch.lap(&mut times.pause_us);
        let Paused { state, frozen } = paused?;

        let state_bytes = snapshot::encode(&state).map_err(|error| ApiError::internal(&error))?;
        let written = files.state.write_all_at(&state_bytes, 0);
        written.map_err(|error| storage_failed(&error).advise("make room on that disk"))?;
        let (kernel, initrd) = self.write_kernel(files.kernel)?;
        let disks: Vec<DiskTaken> = frozen.into_iter().map(export).collect::<Result<_>>()?;
        let memory_bytes = writer.data_bytes();
        let layer = writer.finish(content.checksums).map_err(no_copy)?;
        let id = layer.id();
        if content.becomes_parent {
            let kept = self.dirty_tracker.kept(layer, content.memory_base);
            kept.map_err(|error| ApiError::internal(&error))?;
            self.keep_disks(&disks);
        }
        watch.lap(&mut times.finish_us);
        Ok(SnapshotTaken {
            memory_layer: id.to_string(),
            memory_parent: parent.map(|id| id.to_string()),
            memory_bytes,
            state_bytes: state_bytes.len() as u64,
            disks,
            kernel,
            initrd,
            is_parent: content.becomes_parent,
            cpu: cpu::features_of(CpuProfile::of_saved(&state.vcpus)),
            times,
        })
    }

    /// Writes the kernel and the initial RAM disk; returns whether there is a kernel, and an
    /// initial RAM disk.
    fn write_kernel(&self, files: Option<(File, File)>) -> Result<(bool, bool)> {
        let (Some((kernel, initrd)), Some(boot)) = (files, &self.boot) else {
            return Ok((false, false));
        };
        copy_file(&boot.kernel, &kernel)?;
        if let Some(ours) = &boot.initrd {
            copy_file(ours, &initrd)?;
        }
        Ok((true, boot.initrd.is_some()))
    }

    fn pause_and_read(
        &mut self,
        machine: &mut GuestMachine,
        writer: &mut LayerWriter,
        disks: Vec<(u32, File, File)>,
        content: &Content,
        times: &mut SnapshotTimes,
    ) -> Result<Paused> {
        let state = stop_and_copy(machine, &mut self.dirty_tracker, writer, times)?;
        let mut watch = Stopwatch::start();
        let frozen = self.freeze(disks, &content.disk_bases)?;
        watch.lap(&mut times.freeze_us);
        Ok(Paused { state, frozen })
    }

    /// Freezes the disks in `wanted`, and flushes the files of the others.
    fn freeze(&self, wanted: Vec<(u32, File, File)>, bases: &[usize]) -> Result<Vec<FrozenDisk>> {
        let mut frozen = Vec::with_capacity(wanted.len());
        let chosen: Vec<u32> = wanted.iter().map(|(index, ..)| *index).collect();
        for (index, new_top, export) in wanted {
            let below = bases[index as usize];
            frozen.push(FrozenDisk {
                index,
                parent_layers: below,
                layers: self.freeze_disk(index, new_top, below)?,
                file: export,
            });
        }
        for (index, disk) in (0..).zip(&self.disks) {
            if !chosen.contains(&index) {
                let mut disk = disk.disk.lock().unwrap_or_else(PoisonError::into_inner);
                disk.seal(false)
                    .map_err(|error| ApiError::internal(&error))?;
            }
        }
        Ok(frozen)
    }

    /// Freezes what was written to a disk of the paused guest, and returns its layers from number
    /// `below` on; `None` if there are none.
    pub(super) fn freeze_disk(
        &self,
        index: u32,
        new_top: File,
        below: usize,
    ) -> Result<Option<FrozenLayers>> {
        let mut disk = self.disks[index as usize]
            .disk
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let failed = |error| storage_failed(&error);
        if disk.layers().is_empty() {
            let message = format!("disk {index} is written in place and cannot be frozen");
            return Err(ApiError::new(ErrorCode::Conflict, message)
                .advise("give it an overlay, or copy its file while the VM is paused"));
        }
        // Every layer makes reads slower, so an empty top layer is not frozen.
        if !disk.is_top_empty() {
            disk.freeze(new_top, false).map_err(failed)?;
        }
        match disk.layers().len() - 1 > below {
            true => disk.frozen(below).map(Some).map_err(failed),
            false => Ok(None),
        }
    }

    /// The number of a disk's layers under the one that takes writes.
    pub(super) fn frozen_layers(&self, index: u32) -> usize {
        let disk = &self.disks[index as usize].disk;
        let disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
        disk.layers().len().saturating_sub(1)
    }

    /// Counts the layers that were frozen of these disks as the parent's.
    fn keep_disks(&mut self, taken: &[DiskTaken]) {
        for taken in taken.iter().filter(|taken| taken.written) {
            let disk = &mut self.disks[taken.index as usize];
            let layers = disk.disk.lock().unwrap_or_else(PoisonError::into_inner);
            disk.parent_layers = layers.layers().len() - 1;
        }
    }
}

/// Copies a file with calls that the jail allows. The file positions are left alone, since a reboot
/// may read the same descriptor.
fn copy_file(from: &File, to: &File) -> Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    loop {
        let count = from.read_at(&mut buffer, at);
        let count = count.map_err(|error| ApiError::internal(&error))?;
        if count == 0 {
            return Ok(());
        }
        let written = to.write_all_at(&buffer[..count], at);
        written.map_err(|error| ApiError::internal(&error).advise("make room on that disk"))?;
        at += count as u64;
    }
}

/// Writes the frozen layers of a disk to its file.
fn export(disk: FrozenDisk) -> Result<DiskTaken> {
    let written = disk.layers.is_some();
    if let Some(layers) = disk.layers {
        layers
            .export(&disk.file)
            .map_err(|error| storage_failed(&error))?;
    }
    Ok(DiskTaken {
        index: disk.index,
        parent_layers: disk.parent_layers as u32,
        written,
    })
}
