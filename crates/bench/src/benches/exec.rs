//! The round trip of `exec true`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::guests::{CloneVm, Guest, Machine, Qemu, exec, wait_for_agent};
use crate::record::{Figure, Record};

pub(crate) const ABOUT: &str =
    "round trip of `exec true`, from a client that stays up and by `clone exec`";

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "From connecting to the guest's agent until the command's end is known: a connection, a request, a process in the guest, its end.",
        "`info` is the same without a process. A client that stays up connects to our VM's Unix socket, to QEMU's guest through the host's vsock (vhost-vsock); the agent is the same.",
        "`clone exec` is the whole command, whose own start counts.",
    ]);
    let machine = Machine::standard(context, "vmlinux");
    let ours = CloneVm::start(context, "exec", &machine)?;
    wait_for_agent(&ours).context("our guest")?;
    let qemu = Qemu::start(context, &machine)?;
    wait_for_agent(&qemu).context("QEMU's guest")?;
    let mut times = [const { Vec::new() }; 5];
    for run in 0..=context.samples(100, 500) {
        let start = Instant::now();
        exec(&ours, &["true"]).context("our guest")?;
        let ours_done = start.elapsed();
        exec(&qemu, &["true"]).context("QEMU's guest")?;
        let qemu_done = start.elapsed() - ours_done;
        let start = Instant::now();
        ours.connect()?.info()?;
        let ours_told = start.elapsed();
        qemu.connect()?.info()?;
        let qemu_told = start.elapsed() - ours_told;
        if run > 0 {
            times[0].push(ours_done);
            times[1].push(qemu_done);
            times[2].push(ours_told);
            times[3].push(qemu_told);
        }
    }
    for _ in 0..context.samples(20, 100) {
        times[4].push(by_command(context, &ours)?);
    }
    let names = ["clone", "QEMU", "clone, info", "QEMU, info", "clone exec"];
    for (name, times) in names.iter().zip(&times) {
        record.add(Figure::ms(name, times));
    }
    record.ratio("clone", "QEMU", None)?;
    record.ratio("clone, info", "QEMU, info", None)?;
    Ok(record)
}

fn by_command(context: &Context, vm: &CloneVm<'_>) -> Result<Duration> {
    let mut command = context.clone();
    command.args(["exec", vm.name(), "true"]);
    let start = Instant::now();
    let status = command.status().context("cannot start clone")?;
    anyhow::ensure!(status.success(), "clone exec: {status}");
    Ok(start.elapsed())
}
