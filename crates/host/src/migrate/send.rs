//! The source's launcher.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use clone_api::control::{Custody, MigrationDone, MigrationRequest, VmState};
use clone_api::{ApiError, Client, ClientError, ErrorCode};
use clone_migration::Link;
use clone_start::cgroup;
use clone_start::error::{Result, failed};

use super::frame;
use super::offer::{Offer, Offered, Verdict};
use crate::runtime::{RunningVm, Runtime};
use crate::snapshot;

/// The longest time for a VM to be sent. The VM's process gives up much earlier on a connection that
/// makes no progress.
const LIMIT: Duration = Duration::from_secs(24 * 3600);
/// The longest time for the process of a VM that is not here any more to end.
const END_LIMIT: Duration = Duration::from_secs(30);

/// How a VM is sent.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The most bytes in a second while the guest runs.
    pub bytes_per_second: Option<u64>,
    /// The longest expected pause of the guest, in milliseconds.
    pub max_pause_ms: Option<u64>,
}

/// Moves `vm` to the host at the other end of `link`, and returns when it runs there.
///
/// # Errors
/// The VM then runs on here, and there is nothing of it on the other host; or, if the connection was
/// lost at the very end, it waits here to be told (`Custody::Moved`), as the error says.
pub fn send(
    runtime: &Runtime,
    vm: &RunningVm,
    mut link: Link,
    options: &Options,
) -> Result<MigrationDone> {
    let Offered {
        offer,
        template,
        layers,
    } = Offer::of(vm)?;
    check_runs(vm)?;
    link.set_patience(frame::PATIENCE);
    frame::write(&mut link, &offer)?;
    let mut template = template;
    loop {
        match frame::read(&mut link)? {
            Verdict::Accepted => break,
            Verdict::Refused(reason) => return Err(reason),
            // Once at the most.
            Verdict::SendTemplate => match template.take() {
                Some(template) => clone_template::send(&template, &mut link)?,
                None => {
                    let message =
                        "the other host asks for a template that the VM has not got, or again";
                    return Err(ApiError::new(ErrorCode::BadRequest, message));
                }
            },
        }
    }
    let disks = offer.travelling_disks();
    let tops = disks
        .iter()
        .flat_map(|_| [snapshot::scratch(), snapshot::scratch()]);
    let tops: Vec<File> = tops.collect::<Result<_>>()?;
    let request = MigrationRequest {
        base: layers,
        disks,
        bytes_per_second: options.bytes_per_second,
        max_pause_ms: options.max_pause_ms,
    };
    // Layers in memory count as the VM's own.
    let room: u64 = tops.iter().map(clone_disk::memory_room).sum();
    let birth_path = vm.dir.birth_path();
    cgroup::grow(&birth_path, room as i64).map_err(failed("give room to", &birth_path))?;
    let client = Client::new(vm.dir.control_socket()).with_timeout(LIMIT);
    let mut files: Vec<BorrowedFd<'_>> = link.descriptors().into();
    files.extend(tops.iter().map(AsFd::as_fd));
    let moved = client.migrate(&request, &files);
    // From here on, the stream is the process's alone: it ends when the process ends it.
    drop(link);
    let done = moved.map_err(|error| unmoved(vm, error))?;
    await_end(runtime, vm)?;
    Ok(done)
}

/// Refuses a VM that is paused, before anything is sent.
fn check_runs(vm: &RunningVm) -> Result<()> {
    match Client::new(vm.dir.control_socket()).info()?.state {
        VmState::Running => Ok(()),
        _ => {
            let message = "the VM is paused, and would run on the other host";
            Err(ApiError::new(ErrorCode::Conflict, message).advise("resume it first"))
        }
    }
}

/// Tells a VM where it is, after a migration whose end was not seen: where it was moved to, or where
/// it was before. Returns when the guest runs, or when nothing is left of a VM that is not here.
///
/// # Errors
/// [`ErrorCode::Conflict`] for a VM that need not be told.
pub fn tell(runtime: &Runtime, vm: &RunningVm, is_where_it_was_moved_to: bool) -> Result<()> {
    let client = Client::new(vm.dir.control_socket());
    let custody = client.migration()?.custody;
    match is_where_it_was_moved_to {
        true => client.confirm_migration(),
        false => client.cancel_migration(),
    }?;
    let ends = match is_where_it_was_moved_to {
        true => Custody::Moved,
        false => Custody::Arrived,
    };
    match custody == ends {
        true => await_end(runtime, vm),
        false => Ok(()),
    }
}

/// Waits until the process of a VM that is not here any more has ended, and removes what it left.
fn await_end(runtime: &Runtime, vm: &RunningVm) -> Result<()> {
    if !vm.process.wait(Some(END_LIMIT))? {
        let message = format!(
            "the VM is on the other host, and its process {} here does not end",
            vm.process.pid
        );
        return Err(ApiError::new(ErrorCode::Timeout, message)
            .advise(format!("kill it: clone kill {}", vm.dir.name())));
    }
    runtime.sweep_one(&vm.dir).map(drop)
}

/// The error for a VM that was not moved, or about which it is not known.
fn unmoved(vm: &RunningVm, error: ClientError) -> ApiError {
    let error = match error {
        ClientError::Refused(refusal) => return refusal,
        other => other,
    };
    let client = Client::new(vm.dir.control_socket());
    let status = client.migration();
    let (message, advice) = match status.map(|status| status.custody) {
        Ok(Custody::Here) => (
            "the VM still runs here",
            "look again with `clone ls --state`",
        ),
        Ok(_) => (
            "the VM was given to the other host, which has not said that it runs there",
            "look there; then say `clone migrate --confirm` or `--cancel` on both hosts",
        ),
        Err(_) => (
            "the VM's process has ended, as it does when the VM runs on the other host",
            "look there with `clone ls --state`",
        ),
    };
    let message = format!("the end of the migration was not seen ({error}): {message}");
    ApiError::new(ErrorCode::Timeout, message).advise(advice)
}
