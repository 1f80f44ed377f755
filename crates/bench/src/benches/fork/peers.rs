//! Other VMMs' snapshots of the same guest, and the ratios to them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::counts::Counts;
use super::{COMPARED, REST};
use crate::context::Context;
use crate::guests::cloud_hypervisor::Restore;
use crate::guests::{Guest, Machine, QemuSnapshot, cloud_hypervisor, exec, firecracker};
use crate::record::{Figure, Record};

/// Goals that are set beside Firecracker only.
const STANDBY_GOAL: &str = "at most 0.1";
const STARTED_GOAL: &str = "at most 0.5";
const REPLY_GOAL: &str = "at most 0.25";
const MEMORY_GOAL: &str = "at most 0.5";

pub(super) fn qemu(
    context: &Context,
    machine: &Machine,
    record: &mut Record,
    count: usize,
) -> Result<()> {
    let snapshot = record.twice("QEMU", || QemuSnapshot::take(context, machine))?;
    let fork = |number| snapshot.fork(number);
    series(record, "QEMU", count, fork, |_| Ok(()))?;
    ratios(record, "QEMU", |_| None)
}

pub(super) fn firecracker(
    context: &Context,
    program: &Path,
    machine: &Machine,
    record: &mut Record,
    count: usize,
) -> Result<()> {
    let snapshot = record.twice("Firecracker", || {
        firecracker::Snapshot::take(context, program, machine)
    })?;
    let fork = |number| snapshot.fork(number);
    series(record, "Firecracker", count, fork, |_| Ok(()))?;
    ratios(record, "Firecracker", Some)
}

pub(super) fn cloud_hypervisor(
    context: &Context,
    program: &Path,
    machine: &Machine,
    record: &mut Record,
    count: usize,
) -> Result<()> {
    let snapshot = record.twice("Cloud Hypervisor", || {
        cloud_hypervisor::Snapshot::take(context, program, machine)
    })?;
    for (vmm, restore) in [
        ("Cloud Hypervisor on demand", Restore::OnDemand),
        ("Cloud Hypervisor copied", Restore::Copy),
    ] {
        let fork = |number| snapshot.fork(number, restore);
        series(record, vmm, count, fork, cloud_hypervisor::filled)?;
        ratios(record, vmm, |_| None)?;
    }
    Ok(())
}

/// One after the other, each with its first reply, and the next when it has settled; then the
/// memory of some that rest.
fn series<G: Guest>(
    record: &mut Record,
    vmm: &str,
    count: usize,
    fork: impl Fn(usize) -> Result<(G, Duration)>,
    settle: impl Fn(&G) -> Result<()>,
) -> Result<()> {
    let (mut running, mut replies, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    let mut counts = Counts::default();
    for number in 0..count.max(COMPARED) {
        let start = Instant::now();
        let (guest, time) = fork(number)?;
        exec(&guest, &["true"])?;
        replies.push(start.elapsed());
        running.push(time);
        counts.add(guest.pid())?;
        settle(&guest)?;
        if kept.len() < COMPARED {
            kept.push(guest);
        }
    }
    record.add(Figure::ms(&format!("{vmm}: running"), &running));
    record.add(Figure::ms(&format!("{vmm}: reply"), &replies));
    counts.record(record, vmm);
    std::thread::sleep(REST);
    let pss: Result<Vec<f64>> = kept.iter().map(|guest| pss_mib(guest.pid())).collect();
    record.add(Figure::new(&format!("{vmm}, idle: PSS"), "MiB", pss?));
    Ok(())
}

fn ratios<'a>(
    record: &mut Record,
    vmm: &str,
    goal: impl Fn(&'a str) -> Option<&'a str>,
) -> Result<()> {
    let (running, reply) = (format!("{vmm}: running"), format!("{vmm}: reply"));
    record.ratio("standby: running", &running, goal(STANDBY_GOAL))?;
    record.ratio("started: running", &running, goal(STARTED_GOAL))?;
    record.ratio("standby: reply", &reply, goal(REPLY_GOAL))?;
    record.ratio("started: reply", &reply, None)?;
    let pss = format!("{vmm}, idle: PSS");
    record.ratio("idle clone: PSS", &pss, goal(MEMORY_GOAL))
}

/// What a process is charged of memory, its share of what it shares included (proc_pid_smaps(5)).
pub(super) fn pss_mib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    Ok(kib.with_context(|| format!("{path} has no PSS"))? / 1024.0)
}
