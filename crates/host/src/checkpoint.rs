//! Takes checkpoints of a running VM, and rewinds it.
//!
//! Everything about a checkpoint is in the VM's process. This module makes the files that it needs,
//! which have no name, and sets the guest's clock after a rewind.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use clone_api::checkpoints::{
    CheckpointList, CheckpointName, CheckpointTaken, NewCheckpoint, Rewound,
};
use clone_api::{ApiError, Client, ClientError, ErrorCode, VmConfig};
use clone_start::cgroup;
use clone_start::error::{Result, failed};
use clone_template::Template;

use crate::launch::identity;
use crate::runtime::{RunningVm, Runtime};
use crate::{scratch, snapshot};

/// The time limit for an answer of the VM.
const LIMIT: Duration = Duration::from_secs(600);
/// The room for what a guest writes to its disks besides its memory, in bytes.
const ROOM_FOR_DISKS: i64 = 1 << 30;

/// A VM that was rewound.
#[derive(Debug, Clone)]
pub struct Back {
    /// What the VM's process did.
    pub rewound: Rewound,
    /// The time from then until the guest's clock was right, in microseconds; `None` for a guest
    /// that is paused or has no agent.
    pub clock_us: Option<u64>,
    /// Notices for the owner.
    pub notices: Vec<String>,
}

/// Takes a checkpoint of `vm`, which continues to run.
///
/// # Errors
/// [`ErrorCode::Conflict`] where the name is taken, the VM has too many, or one of its disks keeps
/// its writes; [`ErrorCode::OutOfSpace`] where the host's disk is full.
pub fn take(runtime: &Runtime, vm: &RunningVm, name: &CheckpointName) -> Result<CheckpointTaken> {
    let config = vm.dir.config()?;
    if let Some(index) = config.disks.iter().position(snapshot::keeps_writes) {
        let message = format!("disk {index} of `{}` is written in place", config.name);
        return Err(ApiError::new(ErrorCode::Conflict, message)
            .advise("run VMs that are to have checkpoints with overlay=ephemeral"));
    }
    if let Some(dir) = scratch::dir() {
        // A later checkpoint holds what has changed since another one, which is not known here.
        let is_first = list(vm)?.checkpoints.is_empty();
        let bytes = match is_first {
            true => snapshot::room_for_state(vm)?,
            false => snapshot::ROOM_FOR_STATE,
        };
        runtime.check_room(&dir, bytes)?;
    }
    let mut files = vec![snapshot::scratch()?];
    for _ in 0..2 * written_disks(&config) {
        files.push(snapshot::scratch()?);
    }
    let new = NewCheckpoint {
        name: name.clone(),
        has_agent: has_agent(vm)?,
    };
    let room = config.memory.0 as i64 + ROOM_FOR_DISKS;
    with_room(vm, &files, room, |client, files| {
        client.checkpoint(&new, files)
    })
}

/// The checkpoints of `vm`.
///
/// # Errors
/// Those of the VM's process, as [`ErrorCode::Conflict`] while another one is taken.
pub fn list(vm: &RunningVm) -> Result<CheckpointList> {
    Ok(client(vm).checkpoints()?)
}

/// Removes a checkpoint of `vm`, and returns the others.
///
/// # Errors
/// [`ErrorCode::NotFound`] where there is no such checkpoint.
pub fn remove(vm: &RunningVm, name: &CheckpointName) -> Result<CheckpointList> {
    Ok(client(vm).remove_checkpoint(name)?)
}

/// Rewinds `vm` to one of its checkpoints, and sets its guest's clock.
///
/// # Errors
/// [`ErrorCode::NotFound`] where there is no such checkpoint. A VM that was rewound only in part
/// stays paused, which the error says.
pub fn rewind(vm: &RunningVm, name: &CheckpointName) -> Result<Back> {
    let config = vm.dir.config()?;
    let files = (0..written_disks(&config)).map(|_| snapshot::scratch());
    let files: Vec<File> = files.collect::<Result<_>>()?;
    let rewound = with_room(vm, &files, 0, |client, files| client.rewind(name, files))?;
    let (mut clock_us, mut notices) = (None, Vec::new());
    if rewound.running && rewound.has_agent {
        let start = Instant::now();
        match identity::go_on(vm, &vm.dir.guest_network()?) {
            Ok(more) => {
                notices.extend(more);
                clock_us = Some(start.elapsed().as_micros() as u64);
            }
            // The guest runs, and is where it was.
            Err(error) => notices.push(format!("the guest's clock was not set: {error}")),
        }
    }
    Ok(Back {
        rewound,
        clock_us,
        notices,
    })
}

fn has_agent(vm: &RunningVm) -> Result<bool> {
    let base = vm.dir.parent()?.base_template();
    let template = base.and_then(|base| Template::open(&base.template).ok());
    Ok(snapshot::has_agent(vm, template.as_ref()))
}

fn written_disks(config: &VmConfig) -> usize {
    let written = config.disks.iter().filter(|disk| !disk.read_only);
    written.count()
}

fn client(vm: &RunningVm) -> Client {
    Client::new(vm.dir.control_socket()).with_timeout(LIMIT)
}

/// Sends a request with `files`. They may be in memory, where what the VM writes to them counts
/// against its memory limit, so the limit is raised by `room` meanwhile, and afterwards by what
/// they hold and may come to hold.
fn with_room<T>(
    vm: &RunningVm,
    files: &[File],
    room: i64,
    work: impl FnOnce(&Client, &[BorrowedFd<'_>]) -> std::result::Result<T, ClientError>,
) -> Result<T> {
    let birth_path = vm.dir.birth_path();
    let allow =
        |bytes| cgroup::grow(&birth_path, bytes).map_err(failed("give room to", &birth_path));
    let later: u64 = files.iter().map(clone_disk::memory_room).sum();
    let room = room + later as i64;
    allow(room)?;
    let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let done = work(&client(vm), &descriptors);
    let in_memory = files
        .iter()
        .filter(|file| clone_disk::memory_room(file) > 0);
    let kept: u64 = in_memory.map(snapshot::allocated).sum();
    allow((kept + later) as i64 - room)?;
    Ok(done?)
}
