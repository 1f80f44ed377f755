//! Makes a template of a running VM, and the temporary snapshot that a live fork starts from.
//!
//! The VM's process writes memory, state and the disks' frozen layers into files that are opened
//! here. This module determines the template that they belong to, and the files that it shares with
//! its parent.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use agent_proto::client::{Connection, Deadline};
use clone_api::config::{DiskConfig, Overlay};
use clone_api::control::{SnapshotKind, SnapshotRequest, SnapshotTaken, VmState};
use clone_api::shape::Ceilings;
use clone_api::{ApiError, Client, ClientError, ErrorCode, Shape, VmConfig};
use clone_start::SharedFile;
use clone_start::cgroup;
use clone_start::document::{ForkDisk, Parent};
use clone_start::error::{Result, failed};
use clone_template::{NewTemplate, Parts, Template};

use crate::runtime::{LiveDir, RunningVm, Runtime};
use crate::scratch;

/// The time limit for writing a snapshot.
const LIMIT: Duration = Duration::from_secs(600);
/// The time limit for an agent to report its version.
const AGENT_LIMIT: Duration = Duration::from_secs(5);
/// The index of the first disk's new layer among the files of a snapshot. The file for its frozen
/// layers follows, and then the files of the other disks.
const FIRST_LAYER: usize = 2;
/// The room for the disks' layers of a snapshot besides its memory, in bytes.
const ROOM_FOR_DISKS: i64 = 1 << 30;
/// The room for the machine's state and other small files of a live fork, in bytes.
pub(crate) const ROOM_FOR_STATE: u64 = 16 << 20;

/// Takes a snapshot of `vm` and makes it the template at `target`; the VM continues to run. With
/// `diff`, the template holds only the changes since the template that the VM was forked from, or
/// since its last snapshot, and shares the rest with that.
pub fn take(
    runtime: &Runtime,
    vm: &RunningVm,
    target: &Path,
    diff: bool,
) -> Result<(Template, SnapshotTaken)> {
    vm.check_here()?;
    let config = vm.dir.config()?;
    let known = vm.dir.parent()?;
    let base = known.base_template();
    let parent_dir = base.as_ref().map(|base| base.template.as_path());
    let parent = parent_dir.map(Template::open).and_then(Result::ok);
    if diff && parent.is_none() {
        return Err(no_parent(&config.name, parent_dir));
    }
    if let Some(parent) = &parent {
        // The new template takes over the parent's files, with their hashes.
        parent.ensure_verified(&runtime.verified())?;
    }
    // With `diff`, the guest has the same agent as its parent. Asking the agent for its version
    // would wake it, which changes more pages than an idle guest does in a minute.
    let agent_of_parent = parent
        .as_ref()
        .filter(|_| diff)
        .and_then(|parent| parent.content().agent_version.clone());
    let agent_version = agent_of_parent.or_else(|| agent_version(vm));
    let mut new = NewTemplate::begin(target)?;
    if let Some(parent) = parent.as_ref().filter(|_| diff) {
        new.share_memory(parent)?;
    }
    let mut files = vec![new.memory_file()?, new.state_file()?];
    match &parent {
        Some(parent) => new.share_kernel(parent)?,
        None => files.extend([new.kernel_file()?, new.initrd_file()?]),
    }
    let client = Client::new(vm.dir.control_socket()).with_timeout(LIMIT);
    // Only disks whose writes end with the VM are frozen. Disks that keep their writes are copied
    // while the guest is paused, since the files that they are written to belong to the owner.
    let in_place = config.disks.iter().any(keeps_writes);
    let paused = match in_place {
        true => Some(Paused::pause(&client)?),
        false => None,
    };
    let mut frozen = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        add_disk(&mut new, parent.as_ref(), diff, index, disk, &known)?;
        if disk.overlay == Overlay::Ephemeral && !disk.read_only {
            frozen.push(index as u32);
            files.push(scratch()?);
            files.push(new.disk_layer_file(index)?);
        }
    }
    let request = SnapshotRequest {
        kind: match diff {
            true => SnapshotKind::Diff,
            false => SnapshotKind::Full,
        },
        disks: frozen,
        kernel: parent.is_none(),
        // The layers of a live fork or of a saved VM above its template's are part of the diff.
        base: known
            .base
            .as_ref()
            .filter(|_| diff)
            .map(|it| it.layers.clone()),
        ..SnapshotRequest::default()
    };
    let taken = request_snapshot(vm, &request, &files)?;
    for (index, disk) in config.disks.iter().enumerate() {
        // The snapshot has flushed the layer's file, so it can be copied now.
        if let Overlay::Kept(layer) = &disk.overlay
            && !disk.read_only
        {
            new.copy_layer(index, layer)?;
        }
    }
    drop(paused);
    for disk in taken.disks.iter().filter(|disk| !disk.written) {
        new.drop_disk_layer(disk.index as usize)?;
    }
    if parent.is_none() {
        drop_unwritten(&mut new, &taken)?;
    }
    let parts = Parts {
        parent: parent
            .filter(|_| diff)
            .map(|parent| parent.manifest().id.clone()),
        agent_version,
        shape: Shape::of(&config, &vec![0; config.disks.len()]),
        ceilings: Ceilings::of(&config),
        cpu: taken.cpu.clone(),
        created_unix_ms: clone_base::clock::unix_ms(),
    };
    let template = new.commit(parts, Some(&runtime.verified()))?;
    if taken.is_parent {
        vm.dir.write_parent(&template.parent()?)?;
    }
    Ok((template, taken))
}

/// The layers and state that the clones of a live fork share. Their directory is removed when the
/// last clone is swept.
#[derive(Debug)]
pub struct LiveLayers {
    /// The files that the clones are forked from.
    pub parent: Parent,
    /// The machine's state.
    pub state: SharedFile,
    /// The directory, locked until the clones lock it.
    pub dir: LiveDir,
}

/// Takes a snapshot of `vm` for clones that are made at once; the VM continues to run.
pub fn take_live(runtime: &Runtime, vm: &RunningVm) -> Result<(LiveLayers, SnapshotTaken)> {
    let config = vm.dir.config()?;
    if let Some(index) = config.disks.iter().position(keeps_writes) {
        return Err(ApiError::new(
            ErrorCode::Conflict,
            format!(
                "disk {index} of `{}` keeps its writes: two VMs cannot",
                config.name
            ),
        )
        .advise("run VMs to be forked with overlay=ephemeral, or take a snapshot and fork that"));
    }
    let mut parent = vm.dir.parent()?;
    let room = room_for_state(vm)?;
    let (dir, taken) = runtime.fill_live_dir(room, |dir| fill(vm, &config, dir))?;
    // Only the caller can write to the directory.
    let written = |name: &str| {
        let path = dir.path().join(name);
        let file = File::open(&path).map_err(failed("open", &path))?;
        SharedFile::of(path, &file)
    };
    parent.base = parent.base_template();
    parent.template = None;
    parent.memory.push(written("memory")?);
    parent.locks.push(SharedFile::named(dir.lock_path()));
    for disk in taken.disks.iter().filter(|disk| disk.written) {
        let index = disk.index as usize;
        if let Some(ForkDisk { layers, .. }) = parent.disks.get_mut(index) {
            layers.push(written(&disk_file(disk.index))?);
        }
    }
    let layers = LiveLayers {
        parent,
        state: written("state")?,
        dir,
    };
    Ok((layers, taken))
}

/// Makes the VM write the state that its clones will share into new files.
fn fill(vm: &RunningVm, config: &VmConfig, dir: &LiveDir) -> Result<SnapshotTaken> {
    let mut files = vec![dir.new_file("memory")?, dir.new_file("state")?];
    let mut disks = Vec::new();
    for (index, disk) in (0..).zip(&config.disks) {
        if !disk.read_only {
            disks.push(index);
            files.push(scratch()?);
            files.push(dir.new_file(&disk_file(index))?);
        }
    }
    let request = SnapshotRequest {
        kind: SnapshotKind::Fork,
        disks,
        ..SnapshotRequest::default()
    };
    request_snapshot(vm, &request, &files)
}

fn disk_file(index: u32) -> String {
    format!("disk-{index}")
}

/// An estimate of the bytes that a state of `vm` takes: the memory that it does not share, and as
/// much again as the guest may change during the copy.
pub(crate) fn room_for_state(vm: &RunningVm) -> Result<u64> {
    let client = Client::new(vm.dir.control_socket()).with_timeout(LIMIT);
    let memory = client
        .stats()
        .map_err(|error| ApiError::internal(&error))?
        .memory;
    let own = match memory.guest {
        Some(guest) => guest.private_bytes + guest.swapped_bytes,
        None => memory.guest_bytes,
    };
    Ok((own + own / 8).min(memory.guest_bytes) + ROOM_FOR_STATE)
}

/// The version of the agent in a guest, if it answers. A paused guest does not, and is not waited for.
pub fn agent_version(vm: &RunningVm) -> Option<String> {
    let info = Client::new(vm.dir.control_socket()).info().ok()?;
    if info.state != VmState::Running {
        return None;
    }
    let deadline = Deadline::after(AGENT_LIMIT);
    let connection = Connection::open(&vm.dir.vsock_socket(), deadline).ok()?;
    Some(connection.hello().agent_version.clone())
}

/// Whether the guest of `vm` has an agent. A clone has its template's, and is not asked: that would
/// wake the guest.
pub(crate) fn has_agent(vm: &RunningVm, template: Option<&Template>) -> bool {
    match template {
        Some(template) => template.content().agent_version.is_some(),
        None => agent_version(vm).is_some(),
    }
}

/// Adds the base and the layers below the disk's own writes.
fn add_disk(
    new: &mut NewTemplate,
    parent: Option<&Template>,
    diff: bool,
    index: usize,
    disk: &DiskConfig,
    known: &Parent,
) -> Result<()> {
    let Some(parent) = parent else {
        return match known.disks.get(index) {
            Some(disk) => new.copy_disk(disk),
            None => Err(ApiError::new(
                ErrorCode::Internal,
                format!("it is not known what disk {index} lies on"),
            )),
        };
    };
    // A full snapshot stores all writes over the base in one layer.
    let layers = match diff || disk.read_only || keeps_writes(disk) {
        true => usize::MAX,
        false => 0,
    };
    new.share_disk(parent, index, layers)
}

/// Whether the guest's writes to the disk outlive the VM.
pub(crate) fn keeps_writes(disk: &DiskConfig) -> bool {
    !disk.read_only && disk.overlay != Overlay::Ephemeral
}

/// A file without a name for a disk's writes, which ends with its descriptors.
pub(crate) fn scratch() -> Result<File> {
    let dir = scratch::dir();
    clone_disk::ephemeral(dir.as_deref()).map_err(|error| ApiError::internal(&error))
}

/// Requests a snapshot into `files` from the VM. The files may be in memory, where the VM's writes
/// count against its own memory limit, so the limit is raised first; otherwise the VM would be
/// killed.
pub(crate) fn request_snapshot(
    vm: &RunningVm,
    request: &SnapshotRequest,
    files: &[File],
) -> Result<SnapshotTaken> {
    let client = Client::new(vm.dir.control_socket()).with_timeout(LIMIT);
    let birth_path = vm.dir.birth_path();
    let room = vm.dir.config()?.memory.0 as i64 + ROOM_FOR_DISKS;
    let allow =
        |bytes| cgroup::grow(&birth_path, bytes).map_err(failed("give room to", &birth_path));
    allow(room)?;
    let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let taken = client.snapshot(request, &descriptors);
    // The written bytes stay within the limit; the rest of the allowance is taken back.
    let written: u64 = files.iter().map(allocated).sum();
    // From now on, the guest's writes go to new layers, besides the frozen ones.
    let layers = files.iter().skip(FIRST_LAYER).step_by(2);
    let later: u64 = layers.map(clone_disk::memory_room).sum();
    allow((written + later) as i64 - room)?;
    Ok(taken?)
}

/// The bytes that are allocated for a file.
pub(crate) fn allocated(file: &File) -> u64 {
    file.metadata().map_or(0, |meta| meta.blocks() * 512)
}

fn no_parent(name: &str, template: Option<&Path>) -> ApiError {
    let message = match template {
        Some(path) => format!(
            "`{name}` differs from the template {}, which is gone",
            path.display()
        ),
        None => format!("`{name}` was not forked from a template, and has no snapshot"),
    };
    ApiError::new(ErrorCode::Conflict, message).advise("take a full snapshot, without --diff")
}

/// Removes the requested files that the VM did not write from the template.
fn drop_unwritten(new: &mut NewTemplate, taken: &SnapshotTaken) -> Result<()> {
    if !taken.kernel {
        new.drop_kernel()?;
    }
    if !taken.initrd {
        new.drop_initrd()?;
    }
    Ok(())
}

/// Keeps a VM paused while this value lives, unless it was paused before.
struct Paused<'a> {
    client: &'a Client,
    was_running: bool,
}

impl<'a> Paused<'a> {
    fn pause(client: &'a Client) -> Result<Self> {
        let failed = |error: ClientError| ApiError::internal(&error);
        let was_running = client.info().map_err(failed)?.state == VmState::Running;
        client.pause().map_err(failed)?;
        Ok(Self {
            client,
            was_running,
        })
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if self.was_running
            && let Err(error) = self.client.resume()
        {
            tracing::error!(%error, "the VM is left paused");
        }
    }
}
