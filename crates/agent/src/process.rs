//! Runs programs of the guest for the agent's own work.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// Runs `command` without input. After `limit` it is ended with all its process group: `None`.
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let mut child = command.stdin(Stdio::null()).process_group(0).spawn()?;
    let pid = Pid::from_child(&child);
    let ended = pidfd_open(pid, PidfdFlags::empty()).and_then(|pidfd| {
        let limit = Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))
    });
    // It was not waited for yet, so the number is still its own.
    if ended != Ok(1) {
        kill_process_group(pid, Signal::KILL)?;
    }
    let status = child.wait()?;
    Ok((ended == Ok(1)).then_some(status))
}
