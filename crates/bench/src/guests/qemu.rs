//! QEMU's `microvm`, as lean as its documentation advises, with our devices' counterparts on PCI.

use std::process::{Command, Stdio};
use std::time::Duration;

use agent_proto::client::Connection;
use anyhow::{Context as _, Result};

use super::{CMDLINE, Ended, Guest, MEMORY_MIB, Machine, time_to_first_line, vsock};
use crate::context::Context;

/// The guest's vsock address; ours have one each behind their own socket.
const CID: u32 = 77;

/// A machine of QEMU's.
pub(crate) struct Qemu {
    process: Ended,
}

impl Qemu {
    /// Starts `machine`; its guest is still booting.
    pub(crate) fn start(context: &Context, machine: &Machine) -> Result<Self> {
        let mut command = command(context, machine);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let process = Ended(command.spawn().context("cannot start QEMU")?);
        Ok(Self { process })
    }

    /// The time to its guest's first line; the machine is gone then.
    pub(crate) fn boot(context: &Context, machine: &Machine) -> Result<Duration> {
        time_to_first_line(command(context, machine)).map(|(time, _process)| time)
    }
}

impl Guest for Qemu {
    fn connect(&self) -> Result<Connection> {
        let stream = vsock::connect(CID, agent_proto::PORT).context("QEMU's guest")?;
        Ok(Connection::greet(stream)?)
    }

    fn pid(&self) -> u32 {
        self.process.0.id()
    }
}

fn command(context: &Context, machine: &Machine) -> Command {
    let mut command = context.qemu();
    let mut add = |text: &str| {
        command.args(text.split_whitespace());
    };
    add("-M microvm,pic=off,pit=off,rtc=off,pcie=on,isa-serial=on -accel kvm -bios qboot.rom");
    // Without the paravirtual end of interrupt: with it some guests hung in the testbed. Why is not
    // known.
    add("-cpu host,-kvm-pv-eoi");
    add("-nodefaults -no-user-config -no-reboot -display none -serial stdio");
    add(&format!("-m {MEMORY_MIB} -smp {}", machine.vcpus));
    if machine.standard_devices {
        add(&format!("-device vhost-vsock-pci,guest-cid={CID}"));
        add("-device virtio-balloon-pci,free-page-reporting=on -device virtio-rng-pci");
    }
    if let Some(disk) = &machine.disk {
        add(&format!(
            "-drive file={},if=none,id=disk,format=raw,cache=none,aio=io_uring,discard=unmap",
            disk.display()
        ));
        add("-device virtio-blk-pci,drive=disk");
    }
    if let Some(tap) = &machine.tap {
        add(&format!(
            "-netdev tap,id=net,ifname={tap},script=no,downscript=no,vhost=on"
        ));
        add("-device virtio-net-pci,netdev=net");
    }
    command
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initramfs)
        .args(["-append", CMDLINE]);
    command
}
