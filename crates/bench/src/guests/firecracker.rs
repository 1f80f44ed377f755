//! Firecracker, where a path to its binary is given: boots from a configuration file, and goes on
//! from its snapshots.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use agent_proto::client::Connection;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    CMDLINE, Ended, GREETING_LIMIT, Guest, Machine, connect_when_there, http, time_to_first_line,
    wait_for_agent,
};
use crate::context::Context;

/// A machine of Firecracker's.
pub(crate) struct Firecracker {
    process: Ended,
    vsock: PathBuf,
}

impl Firecracker {
    /// The time to its guest's first line; the machine is gone then.
    pub(crate) fn boot(context: &Context, program: &Path, machine: &Machine) -> Result<Duration> {
        let vsock = context.scratch("firecracker.vsock");
        let config = configuration(context, machine, &vsock)?;
        let mut command = Command::new(program);
        command.args(["--no-api", "--config-file"]).arg(&config);
        time_to_first_line(command).map(|(time, _process)| time)
    }
}

impl Guest for Firecracker {
    fn connect(&self) -> Result<Connection> {
        Ok(Connection::open(&self.vsock, GREETING_LIMIT)?)
    }

    fn pid(&self) -> u32 {
        self.process.0.id()
    }
}

/// A snapshot of Firecracker's, of a guest whose agent was up.
pub(crate) struct FirecrackerSnapshot {
    program: PathBuf,
    folder: PathBuf,
}

impl FirecrackerSnapshot {
    /// Boots `machine`, waits for its agent, and takes the snapshot.
    pub(crate) fn take(context: &Context, program: &Path, machine: &Machine) -> Result<Self> {
        let folder = context.scratch("fc");
        fs::create_dir_all(&folder)?;
        let snapshot = Self {
            program: program.to_owned(),
            folder,
        };
        let (api, vsock) = (snapshot.path("base.api"), snapshot.path("base.vsock"));
        let config = configuration(context, machine, &vsock)?;
        // It makes its sockets itself, and not where one was left.
        let _ = fs::remove_file(&api);
        let mut command = snapshot.command(&api);
        command.arg("--config-file").arg(&config);
        let base = Firecracker {
            process: Ended(command.spawn().context("cannot start Firecracker")?),
            vsock,
        };
        wait_for_agent(&base)?;
        http::send(&api, "PATCH", "/vm", &json!({ "state": "Paused" }))?;
        let files = json!({
            "snapshot_type": "Full",
            "snapshot_path": snapshot.path("state"),
            "mem_file_path": snapshot.path("memory"),
        });
        http::send(&api, "PUT", "/snapshot/create", &files)?;
        Ok(snapshot)
    }

    /// A machine that goes on from the snapshot, and the time from before its process was started
    /// until its API said that it runs.
    pub(crate) fn fork(&self, number: usize) -> Result<(Firecracker, Duration)> {
        let (api, vsock) = (
            self.path(&format!("{number}.api")),
            self.path(&format!("{number}.vsock")),
        );
        for stale in [&api, &vsock] {
            let _ = fs::remove_file(stale);
        }
        let start = Instant::now();
        let process = self.command(&api).spawn();
        let process = Ended(process.context("cannot start Firecracker")?);
        drop(connect_when_there(&api)?);
        let load = json!({
            "snapshot_path": self.path("state"),
            "mem_backend": { "backend_type": "File", "backend_path": self.path("memory") },
            "vsock_override": { "uds_path": vsock },
            "resume_vm": true,
        });
        http::send(&api, "PUT", "/snapshot/load", &load)?;
        Ok((Firecracker { process, vsock }, start.elapsed()))
    }

    fn command(&self, api: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--api-sock")
            .arg(api)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
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
        // The socket must not be there from the run before.
        let _ = fs::remove_file(vsock);
        config["vsock"] = json!({ "guest_cid": 3, "uds_path": vsock });
        config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": true });
        config["entropy"] = json!({});
    }
    let path = context.scratch("firecracker.json");
    fs::write(&path, config.to_string())
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
