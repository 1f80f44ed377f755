//! Switches the guest off, or reboots it.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::conversation::{End, Outbox, Refusal};
use crate::init;

/// Ends the guest in the way of its init: systemd's command where it runs, else a signal.
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
    // The answer must be sent first, since the guest ends afterwards.
    outbox.done()?;
    // BusyBox's init takes SIGTERM for a reboot, ours for the opposite.
    let signal = match (again, init::is_ours()) {
        (false, _) => init::POWER_OFF,
        (true, true) => init::REBOOT,
        (true, false) => libc::SIGTERM,
    };
    if let Some(signal) = Signal::from_named_raw(signal)
        && let Err(error) = kill_process(Pid::INIT, signal)
    {
        crate::say(&format!("cannot signal process 1: {error}"));
    }
    Ok(())
}
