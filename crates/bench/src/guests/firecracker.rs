//! Firecracker, where a path to its binary is given: boots from a configuration file, and goes on
//! from its snapshots.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::peer::{PeerVm, Sockets};
use super::{CMDLINE, Machine, connect_when_there, http, time_to_first_line, wait_for_agent};
use crate::context::Context;

/// The time to its guest's first line; the machine is gone then.
pub(crate) fn boot(context: &Context, program: &Path, machine: &Machine) -> Result<Duration> {
    let sockets = Sockets::fresh(&context.scratch(""), "firecracker");
    let config = configuration(context, machine, &sockets.vsock)?;
    let mut command = Command::new(program);
    command.args(["--no-api", "--config-file"]).arg(&config);
    time_to_first_line(command).map(|(time, _process)| time)
}

/// A snapshot of Firecracker's, of a guest whose agent was up.
pub(crate) struct Snapshot {
    program: PathBuf,
    folder: PathBuf,
}

impl Snapshot {
    /// Boots `machine`, waits for its agent, and takes the snapshot.
    pub(crate) fn take(context: &Context, program: &Path, machine: &Machine) -> Result<Self> {
        let folder = context.scratch("fc");
        fs::create_dir_all(&folder)?;
        let snapshot = Self {
            program: program.to_owned(),
            folder,
        };
        let Sockets { api, vsock } = Sockets::fresh(&snapshot.folder, "base");
        let config = configuration(context, machine, &vsock)?;
        let mut command = snapshot.command(&api);
        command.arg("--config-file").arg(&config);
        let base = PeerVm::spawn(command, &vsock)?;
        wait_for_agent(&base)?;
        http::send(&api, "PATCH", "/vm", Some(json!({ "state": "Paused" })))?;
        let files = json!({
            "snapshot_type": "Full",
            "snapshot_path": snapshot.path("state"),
            "mem_file_path": snapshot.path("memory"),
        });
        http::send(&api, "PUT", "/snapshot/create", Some(files))?;
        Ok(snapshot)
    }

    /// A machine that goes on from the snapshot, and the time from before its process was started
    /// until its API said that it runs.
    pub(crate) fn fork(&self, number: usize) -> Result<(PeerVm, Duration)> {
        let Sockets { api, vsock } = Sockets::fresh(&self.folder, &number.to_string());
        let start = Instant::now();
        let forked = PeerVm::spawn(self.command(&api), &vsock)?;
        drop(connect_when_there(&api)?);
        let load = json!({
            "snapshot_path": self.path("state"),
            "mem_backend": { "backend_type": "File", "backend_path": self.path("memory") },
            "vsock_override": { "uds_path": vsock },
            "resume_vm": true,
        });
        http::send(&api, "PUT", "/snapshot/load", Some(load))?;
        Ok((forked, start.elapsed()))
    }

    fn command(&self, api: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--api-sock").arg(api);
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// Writes the description of `machine`.
fn configuration(context: &Context, machine: &Machine, vsock: &Path) -> Result<PathBuf> {
    let mut config: Value = json!({
        "boot-source": {
            "kernel_image_path": machine.kernel,
            "initrd_path": machine.initramfs,
            "boot_args": CMDLINE,
        },
        "machine-config": {
            "vcpu_count": machine.vcpus,
            "mem_size_mib": machine.memory_mib,
        },
        // As QEMU's, without the paravirtual end of interrupt: KVM's features, bit 6.
        "cpu-config": {
            "cpuid_modifiers": [{
                "leaf": "0x40000001",
                "subleaf": "0x0",
                "flags": 0,
                "modifiers": [{ "register": "eax", "bitmap": "0bxxxxxxxxxxxxxxxxxxxxxxxxx0xxxxxx" }],
            }],
        },
        "drives": [],
    });
    if machine.standard_devices {
        config["vsock"] = json!({ "guest_cid": 3, "uds_path": vsock });
        config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": true });
        config["entropy"] = json!({});
    }
    let path = context.scratch("firecracker.json");
    fs::write(&path, config.to_string())
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
