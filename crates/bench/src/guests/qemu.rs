//! QEMU's `microvm`, as lean as its documentation advises, with our devices' counterparts on PCI;
//! booted, going on from a migration into a file (`mapped-ram`), and migrated to another process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use agent_proto::client::{Connection, Deadline};
use anyhow::{Context as _, Result};
use serde_json::json;

use super::qmp::{self, Monitor};
use super::{
    CMDLINE, Ended, GREETING_LIMIT, Guest, Machine, connect_when_there, time_to_first_line, vsock,
    wait_for_agent,
};
use crate::context::Context;

/// The guest's vsock address; ours have one each behind their own socket.
const CID: u32 = 77;

/// A machine of QEMU's.
pub(crate) struct Qemu {
    process: Ended,
    cid: u32,
}

impl Qemu {
    /// Starts `machine`; its guest is still booting.
    pub(crate) fn start(context: &Context, machine: &Machine) -> Result<Self> {
        Self::spawn(command(context, machine, CID), CID)
    }

    fn spawn(mut command: Command, cid: u32) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let process = Ended(command.spawn().context("cannot start QEMU")?);
        Ok(Self { process, cid })
    }

    /// The time to its guest's first line; the machine is gone then.
    pub(crate) fn boot(context: &Context, machine: &Machine) -> Result<Duration> {
        time_to_first_line(command(context, machine, CID)).map(|(time, _process)| time)
    }
}

impl Guest for Qemu {
    fn connect(&self) -> Result<Connection> {
        let stream = vsock::connect(self.cid, agent_proto::PORT).context("QEMU's guest")?;
        Ok(Connection::greet(stream, Deadline::after(GREETING_LIMIT))?)
    }

    fn pid(&self) -> u32 {
        self.process.0.id()
    }
}

/// A guest's state and RAM as QEMU migrated them into a file.
pub(crate) struct QemuSnapshot<'a> {
    context: &'a Context,
    machine: Machine,
    file: PathBuf,
}

impl<'a> QemuSnapshot<'a> {
    /// Boots `machine`, waits for its agent, and migrates it into a file.
    pub(crate) fn take(context: &'a Context, machine: &Machine) -> Result<Self> {
        let snapshot = Self {
            context,
            machine: machine.clone(),
            file: context.scratch("qemu.migration"),
        };
        let socket = context.scratch("qemu-base.qmp");
        let mut command = command(context, machine, CID);
        add_monitor(&mut command, &socket);
        let base = Qemu::spawn(command, CID)?;
        wait_for_agent(&base)?;
        let mut monitor = Monitor::open(connect_when_there(&socket)?)?;
        monitor.command("stop", json!({}))?;
        monitor.prepare_migration()?;
        let to = json!({ "uri": qmp::file(&snapshot.file) });
        monitor.command("migrate", to)?;
        monitor.migrated()?;
        Ok(snapshot)
    }

    /// A machine that goes on from there, and the time from before its process was started until
    /// its monitor said that it runs.
    pub(crate) fn fork(&self, number: usize) -> Result<(Qemu, Duration)> {
        let socket = self.context.scratch(&format!("qemu-{number}.qmp"));
        let _ = fs::remove_file(&socket);
        let cid = CID + 1 + number as u32;
        let mut command = command(self.context, &self.machine, cid);
        add_monitor(&mut command, &socket);
        command.args(["-incoming", "defer"]);
        let start = Instant::now();
        let qemu = Qemu::spawn(command, cid)?;
        let mut monitor = Monitor::open(connect_when_there(&socket)?)?;
        monitor.prepare_migration()?;
        let from = json!({ "uri": qmp::file(&self.file) });
        monitor.command("migrate-incoming", from)?;
        monitor.migrated()?;
        // It was stopped when it was saved.
        monitor.command("cont", json!({}))?;
        Ok((qemu, start.elapsed()))
    }
}

/// What QEMU says of a migration.
pub(crate) struct QemuMove {
    /// The machine at its new place.
    pub(crate) arrived: Qemu,
    pub(crate) downtime: Duration,
    pub(crate) total: Duration,
    pub(crate) bytes: u64,
}

impl QemuMove {
    /// Starts `machine` with a monitor, so that it can be moved.
    pub(crate) fn start(context: &Context, machine: &Machine) -> Result<Qemu> {
        let socket = monitor_at(context, "source");
        let _ = fs::remove_file(&socket);
        let mut command = command(context, machine, CID);
        add_monitor(&mut command, &socket);
        Qemu::spawn(command, CID)
    }

    /// Moves what [`QemuMove::start`] started to a process in the network namespace `namespace`, which
    /// has the tap of `there`.
    pub(crate) fn run(context: &Context, there: &Machine, namespace: &str) -> Result<Self> {
        let socket = monitor_at(context, "destination");
        let stream = context.scratch("qemu-move.stream");
        for path in [&socket, &stream] {
            let _ = fs::remove_file(path);
        }
        // Two guests of one host cannot have the same address of vsock.
        let cid = CID + 1;
        let qemu = command(context, there, cid);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]);
        command.arg(qemu.get_program()).args(qemu.get_args());
        for (name, value) in qemu.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        add_monitor(&mut command, &socket);
        command.args(["-incoming", "defer"]);
        let arrived = Qemu::spawn(command, cid)?;
        let mut destination = Monitor::open(connect_when_there(&socket)?)?;
        let uri = json!({ "uri": format!("unix:{}", stream.display()) });
        destination.switch_on(&["events"])?;
        destination.command("migrate-incoming", uri.clone())?;
        let mut source = Monitor::open(connect_when_there(&monitor_at(context, "source"))?)?;
        source.switch_on(&["events"])?;
        // As fast as it goes, which ours is, too.
        source.command(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 10_u64 << 30 }),
        )?;
        source.command("migrate", uri)?;
        source.migrated()?;
        destination.migrated()?;
        let told = source.command("query-migrate", json!({}))?;
        let ms = |name: &str| Duration::from_millis(told[name].as_u64().unwrap_or_default());
        let bytes = told["ram"]["transferred"].as_u64();
        Ok(Self {
            arrived,
            downtime: ms("downtime"),
            total: ms("total-time"),
            bytes: bytes.context("QEMU does not say what it sent")?,
        })
    }
}

fn monitor_at(context: &Context, side: &str) -> PathBuf {
    context.scratch(&format!("qemu-move-{side}.qmp"))
}

fn add_monitor(command: &mut Command, socket: &Path) {
    let address = format!("unix:{},server=on,wait=off", socket.display());
    command.args(["-qmp", &address]);
}

fn command(context: &Context, machine: &Machine, cid: u32) -> Command {
    let mut command = context.qemu();
    let mut add = |text: &str| {
        command.args(text.split_whitespace());
    };
    add("-M microvm,pic=off,pit=off,rtc=off,pcie=on,isa-serial=on -accel kvm -bios qboot.rom");
    // Without the paravirtual end of interrupt: with it some guests hung in the testbed. Why is not
    // known.
    add("-cpu host,-kvm-pv-eoi");
    add("-nodefaults -no-user-config -no-reboot -display none -serial stdio");
    add(&format!("-m {} -smp {}", machine.memory_mib, machine.vcpus));
    if machine.standard_devices {
        add(&format!("-device vhost-vsock-pci,guest-cid={cid}"));
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
