//! Suspends a running VM.
//!
//! The VM's process writes the state and keeps its guest paused. The state is made durable and gets
//! its name; then the process is ended. Up to the name, a failure lets the guest run on. After it,
//! whoever is killed, the paused VM and its state are the same, and the state is void if the VM is
//! resumed in its process after all.

use std::time::{Duration, Instant};

use clone_api::config::Overlay;
use clone_api::control::{BaseLayers, SnapshotKind, SnapshotRequest, SnapshotTaken, VmState};
use clone_api::{ApiError, Client, ErrorCode, VmConfig};
use clone_start::document::{BaseTemplate, ForkDisk, Parent};
use clone_start::error::{Result, storage_failed};
use clone_template::Template;
use rustix::process::Signal;

use crate::runtime::{RunningVm, Runtime};
use crate::snapshot;
use crate::suspended::{Base, MEMORY, NewState, RAN, Record, STATE, disk_file};

/// The time limit for a killed process to end.
const END_LIMIT: Duration = Duration::from_secs(30);
/// The time limit for the guest to be let run again after a failure.
const RESUME_LIMIT: Duration = Duration::from_secs(30);

/// What a suspension did.
#[derive(Debug, Clone)]
pub struct Suspended {
    /// The memory that was written, in bytes.
    pub memory_bytes: u64,
    /// The time that the whole took, in microseconds.
    pub took_us: u64,
    /// The stages of the snapshot.
    pub taken: SnapshotTaken,
}

/// Suspends `vm`: ends its process, and keeps everything of the VM.
///
/// # Errors
/// Where the state cannot be written; the VM then goes on as it was.
pub fn suspend(runtime: &Runtime, vm: &RunningVm) -> Result<Suspended> {
    let start = Instant::now();
    let vms = runtime.suspended()?;
    let config = vm.dir.config()?;
    let (base, template) = base_of(&config, &vm.dir.parent()?)?;
    let has_agent = snapshot::has_agent(vm, template.as_ref());
    let mut record = Record::new(config, vm.dir.guest_network()?, base, has_agent);
    let new = NewState::begin(&vms, &record.config.name)?;
    runtime.check_room(new.dir(), snapshot::room_for_state(vm)?)?;
    let paused = ResumeOnFailure::new(vm)?;
    let taken = capture(&new, vm, &mut record)?;
    new.finish(&record, template.as_ref())?;
    // From here on, the state is the VM.
    paused.disarm();
    vm.process.signal(Signal::KILL)?;
    if !vm.process.wait(Some(END_LIMIT))? {
        let message = format!("process {} was killed and does not end", vm.process.pid);
        return Err(ApiError::new(ErrorCode::Timeout, message));
    }
    runtime.sweep_one(&vm.dir)?;
    Ok(Suspended {
        memory_bytes: taken.memory_bytes,
        took_us: start.elapsed().as_micros() as u64,
        taken,
    })
}

/// The files under the state: the layers of the VM's template where it is still there, otherwise
/// the files that the VM was booted from.
pub(crate) fn base_of(config: &VmConfig, parent: &Parent) -> Result<(Base, Option<Template>)> {
    if let Some(base) = parent.base_template() {
        let BaseTemplate { template, layers } = base;
        let template = Template::open(&template)?;
        let same = template.parent()?.memory.first() == parent.memory.first();
        if !same {
            let message = format!(
                "`{}` was forked from another template than the one that is now at {}",
                config.name,
                template.dir().display()
            );
            return Err(ApiError::new(ErrorCode::Conflict, message));
        }
        let base = Base::Template {
            dir: template.dir().to_owned(),
            id: template.manifest().id.clone(),
            layers,
        };
        return Ok((base, Some(template)));
    }
    let disks = parent.disks.iter().zip(&config.disks);
    let disks = disks.map(|(shared, disk)| ForkDisk {
        // Layers that the VM writes, or that are saved with it, are not below it.
        layers: match disk.read_only {
            true => shared.layers.clone(),
            false => Vec::new(),
        },
        ..shared.clone()
    });
    let base = Base::Files {
        disks: disks.collect(),
        boot: parent.boot.clone(),
    };
    Ok((base, None))
}

/// Has the VM write its state, after which its guest stays paused.
fn capture(new: &NewState<'_>, vm: &RunningVm, record: &mut Record) -> Result<SnapshotTaken> {
    let mut files = vec![new.new_file(MEMORY)?, new.new_file(STATE)?];
    let mut disks = Vec::new();
    for (index, disk) in (0..).zip(&record.config.disks) {
        if !disk.read_only && disk.overlay == Overlay::Ephemeral {
            disks.push(index);
            files.push(snapshot::scratch()?);
            files.push(new.new_file(&disk_file(index))?);
        }
    }
    files.push(new.new_file(RAN)?);
    let request = SnapshotRequest {
        kind: SnapshotKind::Save,
        base: match &record.base {
            Base::Template { layers, .. } => Some(layers.clone()),
            Base::Files { disks, .. } => Some(BaseLayers {
                memory: 0,
                disks: disks.iter().map(|it| it.layers.len() as u32).collect(),
            }),
        },
        disks,
        stay_paused: true,
        ..SnapshotRequest::default()
    };
    let taken = snapshot::request_snapshot(vm, &request, &files)?;
    for disk in &taken.disks {
        match disk.written {
            true => record.written_disks.push(disk.index),
            false => new.drop_file(&disk_file(disk.index))?,
        }
    }
    for file in &files {
        let synced = file.sync_all();
        synced.map_err(|error| storage_failed(&error).advise("make room on that disk"))?;
    }
    Ok(taken)
}

fn is_running(vm: &RunningVm) -> Result<bool> {
    let info = Client::new(vm.dir.control_socket()).info();
    let info = info.map_err(|error| ApiError::internal(&error))?;
    Ok(info.state == VmState::Running)
}

/// Lets the guest run again if the suspension fails.
struct ResumeOnFailure<'a>(Option<&'a RunningVm>);

impl<'a> ResumeOnFailure<'a> {
    /// A VM that is paused already is left so.
    fn new(vm: &'a RunningVm) -> Result<Self> {
        Ok(Self(is_running(vm)?.then_some(vm)))
    }

    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for ResumeOnFailure<'_> {
    fn drop(&mut self) {
        let Some(vm) = self.0 else { return };
        let client = Client::new(vm.dir.control_socket()).with_timeout(RESUME_LIMIT);
        if let Err(error) = client.resume() {
            tracing::error!(%error, "the VM is left paused");
        }
    }
}
