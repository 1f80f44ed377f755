//! Switching the guest off, or on again.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use rustix::system::{RebootCommand, reboot};

use crate::session::{End, Outbox, Refusal};

/// Ends the guest in the way of its init: through systemd where it runs, by the kernel where this
/// agent is all there is.
pub(crate) fn shutdown(again: bool, outbox: &Outbox) -> Result<(), End> {
    rustix::fs::sync();
    if Path::new("/run/systemd/system").exists() {
        let verb = if again { "reboot" } else { "poweroff" };
        let mut systemctl = Command::new("systemctl");
        systemctl.args(["--no-block", verb]).process_group(0);
        let status = systemctl
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        match status {
            Ok(status) if status.success() => return outbox.done(),
            Ok(status) => {
                let message = format!("systemctl {verb} failed: {status}");
                return Err(Refusal::new(agent_proto::messages::ErrorCode::Other, message).into());
            }
            Err(error) => return Err(Refusal::io("cannot run systemctl", &error).into()),
        }
    }
    // The host must hear it first: afterwards there is nobody to tell.
    outbox.done()?;
    if rustix::process::getppid().is_none_or(Pid::is_init) {
        let _ = reboot(if again {
            RebootCommand::Restart
        } else {
            RebootCommand::PowerOff
        });
        return Ok(());
    }
    // Another init: SIGUSR2 is busybox's word for power off, SIGTERM its word for reboot.
    let signal = if again { Signal::TERM } else { Signal::USR2 };
    let _ = kill_process(Pid::INIT, signal);
    Ok(())
}
