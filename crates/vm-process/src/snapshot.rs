//! Taking a snapshot of the VM while it runs.
//!
//! On a thread of its own: copy what differs from the parent while the guest goes on, again what
//! changed meanwhile, then pause, copy the last of it, read the machine's state, freeze the disks,
//! and let the guest go on. Only then come checksums and the disks' content. So the pause does not
//! grow with memory, but with what the guest writes in the time that the last copy takes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::Instant;

use clone_api::control::{DiskTaken, SnapshotKind, SnapshotRequest, SnapshotTaken, SnapshotTimes};
use clone_api::{ApiError, ErrorCode};
use clone_disk::{Disk, FrozenLayers};
use clone_memory::{Checksums, LayerWriter};
use clone_start::cpu;
use clone_start::error::{Result, storage_failed};
use clone_vmm::machine::{Machine, MachineState};
use clone_vmm::snapshot::{self, CpuProfile};

use super::lineage::Lineage;
use super::machine::{SharedMachine, locked, machine_error};
use super::open::BootFiles;

/// While the guest runs, what it changed is copied again until there is no more of it than this.
const SMALL_BYTES: u64 = 1 << 20;
/// How often at most: a guest that writes faster than it is copied is paused in the end.
const ROUNDS: usize = 4;
/// How much of a kernel is copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// A writable disk of the VM.
#[derive(Clone)]
pub(super) struct SnapshotDisk {
    /// Locked by its device, for a call at a time.
    pub(super) disk: Arc<Mutex<Disk>>,
    /// How many of its layers belong to the parent.
    pub(super) parent_layers: usize,
}

/// What snapshots are taken of.
pub(super) struct Subject {
    pub(super) machine: SharedMachine,
    pub(super) lineage: Lineage,
    /// In the order of the description.
    pub(super) disks: Vec<SnapshotDisk>,
    /// What it boots when it reboots; none for a clone whose template has none.
    pub(super) boot: Option<BootFiles>,
}

/// The subject, locked by the thread that takes a snapshot: one at a time.
pub(super) type SharedSubject = Arc<Mutex<Subject>>;

/// Where a snapshot goes.
struct Files {
    memory: File,
    state: File,
    /// For the kernel and the initial RAM disk, where they are wanted.
    kernel: Option<(File, File)>,
    /// For each disk: the layer for new writes, and where the frozen ones go.
    disks: Vec<(u32, File, File)>,
}

impl Files {
    fn sort(request: &SnapshotRequest, files: Vec<OwnedFd>) -> Result<Self> {
        let kernel = if request.kernel { 2 } else { 0 };
        let wanted = 2 + kernel + 2 * request.disks.len();
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
        Ok(Self {
            memory,
            state,
            kernel,
            disks: disks.collect::<Result<_>>()?,
        })
    }
}

/// Takes a snapshot. Whatever fails, the guest goes on.
pub(super) fn take(
    subject: &SharedSubject,
    request: &SnapshotRequest,
    files: Vec<OwnedFd>,
) -> Result<SnapshotTaken> {
    let mut subject = match subject.try_lock() {
        Ok(subject) => subject,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => {
            let message = "a snapshot of this VM is being taken already";
            return Err(ApiError::new(ErrorCode::Conflict, message).advise("try again after it"));
        }
    };
    let files = Files::sort(request, files)?;
    let disks = files.disks.iter().map(|(index, ..)| *index as usize);
    for index in disks {
        if index >= subject.disks.len() {
            let message = format!("the VM has no disk {index}");
            return Err(ApiError::new(ErrorCode::InvalidConfig, message));
        }
    }
    let was_tracked = subject.lineage.is_tracked();
    let taken = subject.take(request.kind, files);
    if taken.is_err() || request.kind == SnapshotKind::Fork {
        subject.lineage.not_kept(was_tracked);
    }
    taken
}

/// What is read while the guest is paused.
struct Paused {
    state: MachineState,
    frozen: Vec<FrozenDisk>,
}

/// What was frozen of a disk, and where it goes.
struct FrozenDisk {
    index: u32,
    /// How many layers lie below.
    parent_layers: usize,
    /// None where nothing was written.
    layers: Option<FrozenLayers>,
    file: File,
}

impl Subject {
    fn take(&mut self, kind: SnapshotKind, files: Files) -> Result<SnapshotTaken> {
        let mut times = SnapshotTimes::default();
        let mut watch = Stopwatch::start();
        let full = kind == SnapshotKind::Full;
        let parent = match full {
            true => None,
            false => self.lineage.parent_id(),
        };
        let memory = Arc::clone(self.lineage.memory());
        let mut writer =
            LayerWriter::new(files.memory, "memory", *memory.layout(), parent).map_err(no_copy)?;
        self.copy_running(&mut writer, full)?;
        watch.lap(&mut times.copy_us);

        let machine = Arc::clone(&self.machine);
        let mut machine = locked(&machine);
        let was_running = machine.is_running();
        let paused = self.pause_and_read(&mut machine, &mut writer, files.disks, full, &mut times);
        if was_running {
            machine.resume().map_err(machine_error)?;
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
        let layer = writer
            .finish(match kind {
                SnapshotKind::Fork => Checksums::Transient,
                SnapshotKind::Full | SnapshotKind::Diff => Checksums::Yes,
            })
            .map_err(no_copy)?;
        let id = layer.id();
        if kind != SnapshotKind::Fork {
            let kept = self.lineage.kept(layer, full);
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
            cpu: cpu::features_of(CpuProfile::of_saved(&state.vcpus)),
            times,
        })
    }

    /// Writes what the VM boots; whether there is a kernel and an initial RAM disk.
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

    /// Copies while the guest runs, until little is left.
    fn copy_running(&mut self, writer: &mut LayerWriter, full: bool) -> Result<()> {
        let memory = Arc::clone(self.lineage.memory());
        let mut pages = self.lineage.begin().map_err(no_tracking)?;
        if full {
            pages = self.lineage.all_data();
        }
        for _ in 0..ROUNDS {
            writer.copy(&memory, &pages).map_err(no_copy)?;
            pages = self.lineage.take_changed().map_err(no_tracking)?;
            if pages.bytes() < SMALL_BYTES {
                break;
            }
        }
        writer.copy(&memory, &pages).map_err(no_copy)
    }

    fn pause_and_read(
        &mut self,
        machine: &mut Machine,
        writer: &mut LayerWriter,
        disks: Vec<(u32, File, File)>,
        full: bool,
        times: &mut SnapshotTimes,
    ) -> Result<Paused> {
        let mut watch = Stopwatch::start();
        let mut machine = machine.pause().map_err(machine_error)?;
        watch.lap(&mut times.stop_us);
        if machine.exit().is_some() {
            // Its next instruction is the end: nothing of use could be forked from it.
            let message = "the VM is ending or rebooting";
            return Err(ApiError::new(ErrorCode::Conflict, message).advise("try again after it"));
        }
        let pages = self.lineage.take_changed().map_err(no_tracking)?;
        times.last_copy_bytes = pages.bytes();
        let memory = self.lineage.memory();
        writer.copy(memory, &pages).map_err(no_copy)?;
        watch.lap(&mut times.last_copy_us);
        let state = machine.save().map_err(machine_error)?;
        watch.lap(&mut times.save_us);
        let frozen = self.freeze(disks, full)?;
        watch.lap(&mut times.freeze_us);
        Ok(Paused { state, frozen })
    }

    /// Freezes disks that are to be, and brings the files of the others up to date.
    fn freeze(&self, wanted: Vec<(u32, File, File)>, full: bool) -> Result<Vec<FrozenDisk>> {
        let mut frozen = Vec::with_capacity(wanted.len());
        let chosen: Vec<u32> = wanted.iter().map(|(index, ..)| *index).collect();
        for (index, new_top, export) in wanted {
            let SnapshotDisk {
                disk,
                parent_layers,
            } = &self.disks[index as usize];
            let below = if full { 0 } else { *parent_layers };
            let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
            let failed = |error| storage_failed(&error);
            if disk.layers().is_empty() {
                let message = format!("disk {index} is written in place and cannot be frozen");
                return Err(ApiError::new(ErrorCode::Conflict, message)
                    .advise("give it an overlay, or copy its file while the VM is paused"));
            }
            // Layers cost; a top that nothing was written to is as good as frozen.
            if !disk.is_top_empty() {
                disk.freeze(new_top, false).map_err(failed)?;
            }
            let layers = match disk.layers().len() - 1 > below {
                true => Some(disk.frozen(below).map_err(failed)?),
                false => None,
            };
            frozen.push(FrozenDisk {
                index,
                parent_layers: below,
                layers,
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

    /// What was frozen of these disks is the parent's now.
    fn keep_disks(&mut self, taken: &[DiskTaken]) {
        for taken in taken.iter().filter(|taken| taken.written) {
            let disk = &mut self.disks[taken.index as usize];
            let layers = disk.disk.lock().unwrap_or_else(PoisonError::into_inner);
            disk.parent_layers = layers.layers().len() - 1;
        }
    }
}

/// Copies a file, by calls that the jail allows. Where it is read for a reboot, too, positions do
/// not matter.
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

/// Writes what was frozen of a disk.
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

fn no_tracking(error: clone_memory::DirtyError) -> ApiError {
    ApiError::new(
        ErrorCode::HostUnsupported,
        format!("cannot find out what the guest has changed: {error}"),
    )
}

fn no_copy(error: clone_memory::LayerError) -> ApiError {
    storage_failed(&error).advise("make room where the snapshot goes")
}

/// Measures stages one after the other.
struct Stopwatch(Instant);

impl Stopwatch {
    fn start() -> Self {
        Self(Instant::now())
    }

    /// Writes the time since the last lap.
    fn lap(&mut self, into_us: &mut u64) {
        let now = Instant::now();
        *into_us = now.duration_since(self.0).as_micros() as u64;
        self.0 = now;
    }
}
