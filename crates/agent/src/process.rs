//! Runs programs of the guest for the agent's own work.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// Runs `command` without input. After `limit` it is ended with all its process group: `None`.
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let mut child = command.stdin(Stdio::null()).process_group(0).spawn()?;
    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty());
    let ended = pidfd.is_ok_and(|pidfd| {
        let ended = clone_base::wait::readable(&pidfd, Some(limit));
        ended.unwrap_or(false)
    });
    // It was not waited for yet, so the number is still its own.
    if !ended {
        kill_process_group(pid, Signal::KILL)?;
    }
    let status = child.wait()?;
    Ok(ended.then_some(status))
}
