//! Checkpoints and rewinds of a clone, beside live forks of it, with two sizes of memory and two
//! amounts of change: what each pauses the guest for, and what a rewind spends its pause on.

use std::time::Duration;

use agent_proto::client::{Connection, Deadline};
use anyhow::{Context as _, Result};
use clone_api::checkpoints::{CheckpointName, RewindTimes};
use clone_host::checkpoint;
use clone_host::launch::fork::{Overrides, Source, fork};
use clone_host::runtime::RunningVm;

use super::fork::ForkBench;
use crate::context::Context;
use crate::guests::{Machine, exec_on, told};
use crate::record::{Figure, Record};

pub(crate) const ABOUT: &str =
    "checkpoints and rewinds of a clone: pauses and their stages, beside a live fork's pause";

/// The guests' memory.
const MEMORY_MIB: [u64; 2] = [256, 1024];
/// What the guest changes after its checkpoint.
const CHANGED_MIB: [u32; 2] = [0, 16];
/// How long an agent may take.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "A tiny guest is booted and made a template, and a clone of it is paused by a live fork, a checkpoint and a rewind in turn. Before each, its guest has written the given amount to memory that it wrote before the checkpoint, too.",
        "Pause: from the request to stop the CPUs until they run again. Clock: from then until the agent has set the guest's clock, through a new connection.",
    ]);
    for memory_mib in MEMORY_MIB {
        let machine = Machine {
            memory_mib,
            ..Machine::standard(context, "vmlinux")
        };
        let name = format!("of{memory_mib}");
        let bench = ForkBench::new(context, &name, &machine)?;
        let names = ["rewound".to_owned()];
        let forked = fork(
            &bench.runtime,
            &bench.source()?,
            &names,
            &Overrides::default(),
            true,
        );
        let forked = forked.into_iter().collect::<Result<Vec<_>, _>>();
        let forked = forked.map_err(told)?;
        let vm = bench.runtime.find(&names[0]).map_err(told)?;
        write(&vm, CHANGED_MIB[1])?;
        for changed in CHANGED_MIB {
            let what = format!("{memory_mib} MiB, {changed} MiB changed");
            let runs = context.samples(5, 20);
            pauses(&bench, &vm, &mut record, &what, (changed, runs))?;
        }
        bench.end(&forked)?;
    }
    Ok(record)
}

fn pauses(
    bench: &ForkBench<'_>,
    vm: &RunningVm,
    record: &mut Record,
    what: &str,
    (changed, runs): (u32, usize),
) -> Result<()> {
    let name: CheckpointName = "bench".parse().map_err(told)?;
    let (mut forks, mut checkpoints) = (Vec::new(), Vec::new());
    let (mut rewinds, mut clocks) = (Vec::new(), Vec::new());
    let us = Duration::from_micros;
    for _ in 0..runs {
        write(vm, changed)?;
        let (source, taken) = Source::live(&bench.runtime, vm).map_err(told)?;
        drop(source);
        forks.push(us(taken.times.pause_us));
        write(vm, changed)?;
        let taken = checkpoint::take(&bench.runtime, vm, &name).map_err(told)?;
        checkpoints.push(us(taken.times.pause_us));
        write(vm, changed)?;
        let back = checkpoint::rewind(vm, &name).map_err(told)?;
        clocks.extend(back.clock_us.map(us));
        rewinds.push(back.rewound.times);
        checkpoint::remove(vm, &name).map_err(told)?;
    }
    record.add(Figure::ms(&format!("live fork, {what}"), &forks));
    record.add(Figure::ms(&format!("checkpoint, {what}"), &checkpoints));
    let stage = |of: fn(&RewindTimes) -> u64| -> Vec<Duration> {
        rewinds.iter().map(|times| us(of(times))).collect()
    };
    let rewind = format!("rewind, {what}");
    record.add(Figure::ms(&rewind, &stage(|it| it.pause_us)));
    for (name, times) in [
        ("stopping", stage(|it| it.stop_us)),
        ("finding pages", stage(|it| it.find_us)),
        ("memory", stage(|it| it.memory_us)),
        ("disks", stage(|it| it.disks_us)),
        ("restoring", stage(|it| it.restore_us)),
        ("clock", clocks),
    ] {
        record.add(Figure::ms(&format!("{rewind}: {name}"), &times));
    }
    Ok(())
}

/// Has the guest write so much to a file in memory, over what it wrote before.
fn write(vm: &RunningVm, mib: u32) -> Result<()> {
    let script = format!(
        "dd if=/dev/urandom of=/run/changed bs=64k count={} conv=notrunc 2>/dev/null",
        mib * 16
    );
    let connection = Connection::open(&vm.dir.vsock_socket(), Deadline::after(LIMIT))?;
    exec_on(connection, &["sh", "-c", &script])
        .map(drop)
        .context("the clone")
}
