//! Our own machines, through the command as a person uses it.

use std::process::Command;
use std::time::Duration;

use agent_proto::client::{Connection, Deadline};
use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{CMDLINE, GREETING_LIMIT, Guest, Machine, time_to_first_line};
use crate::context::Context;

/// What `clone run --json` tells.
#[derive(Deserialize)]
struct Started {
    pid: u32,
    vsock_socket: String,
}

/// A VM of ours.
pub(crate) struct CloneVm<'a> {
    name: String,
    started: Started,
    context: &'a Context,
}

impl<'a> CloneVm<'a> {
    /// Starts `machine`; its guest is still booting.
    pub(crate) fn start(context: &'a Context, name: &str, machine: &Machine) -> Result<Self> {
        let mut command = run(context, name, machine);
        command.arg("--json");
        let output = command.output().context("cannot start clone")?;
        anyhow::ensure!(
            output.status.success(),
            "clone run: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let started = serde_json::from_slice(&output.stdout).context("clone run --json")?;
        Ok(Self {
            name: name.to_owned(),
            started,
            context,
        })
    }

    /// The time to its guest's first line; the VM is gone then.
    pub(crate) fn boot(context: &Context, machine: &Machine) -> Result<Duration> {
        let measured = time_to_first_line(run(context, "boot", machine));
        remove(context, "boot");
        measured.map(|(time, _process)| time)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Guest for CloneVm<'_> {
    fn connect(&self) -> Result<Connection> {
        let path = self.started.vsock_socket.as_ref();
        Ok(Connection::open(path, Deadline::after(GREETING_LIMIT))?)
    }

    fn pid(&self) -> u32 {
        self.started.pid
    }
}

impl Drop for CloneVm<'_> {
    fn drop(&mut self) {
        remove(self.context, &self.name);
    }
}

/// Ends a VM; one that is gone is fine.
fn remove(context: &Context, name: &str) {
    let _ = context.clone().args(["rm", "--force", name]).output();
}

fn run(context: &Context, name: &str, machine: &Machine) -> Command {
    let mut command = context.clone();
    command
        .args(["run", "--name", name, "--memory"])
        .arg(format!("{}M", machine.memory_mib))
        .arg("--cpus")
        .arg(machine.vcpus.to_string())
        .arg("--cmdline")
        .arg(match machine.root {
            true => format!("{CMDLINE} root=/dev/vda"),
            false => CMDLINE.to_owned(),
        })
        .arg("--kernel")
        .arg(&machine.kernel)
        .arg("--initrd")
        .arg(&machine.initramfs);
    if !machine.standard_devices {
        command.args(["--no-vsock", "--no-balloon", "--no-rng"]);
    }
    if let Some(disk) = &machine.disk {
        let mut disk = disk.clone().into_os_string();
        if machine.root {
            disk.push(",overlay=ephemeral");
        }
        command.arg("--disk").arg(disk);
    }
    if let Some(tap) = &machine.tap {
        command.arg("--net").arg(format!("tap={tap},vhost=on"));
    }
    if let Some(bridge) = &machine.bridge {
        command
            .arg("--net")
            .arg(format!("bridge={bridge},vhost=on"));
    }
    command
}
