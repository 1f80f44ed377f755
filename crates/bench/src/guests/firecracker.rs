//! Firecracker, where a path to its binary is given: boots from a configuration file.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{CMDLINE, MEMORY_MIB, Machine, time_to_first_line};
use crate::context::Context;

/// A machine of Firecracker's.
pub(crate) struct Firecracker;

impl Firecracker {
    /// The time to its guest's first line; the machine is gone then.
    pub(crate) fn boot(context: &Context, program: &Path, machine: &Machine) -> Result<Duration> {
        let mut config = json!({
            "boot-source": {
                "kernel_image_path": machine.kernel,
                "initrd_path": machine.initramfs,
                "boot_args": CMDLINE,
            },
            "machine-config": { "vcpu_count": machine.vcpus, "mem_size_mib": MEMORY_MIB },
            "drives": [],
        });
        if machine.standard_devices {
            // The socket must not be there from the run before.
            let socket = context.scratch("firecracker.vsock");
            let _ = fs::remove_file(&socket);
            config["vsock"] = json!({ "guest_cid": 3, "uds_path": socket });
            config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": true });
            config["entropy"] = json!({});
        }
        let path = context.scratch("firecracker.json");
        fs::write(&path, config.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
        let mut command = Command::new(program);
        command.args(["--no-api", "--config-file"]).arg(&path);
        time_to_first_line(command).map(|(time, _process)| time)
    }
}
