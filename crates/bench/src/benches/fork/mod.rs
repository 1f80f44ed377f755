//! Forks, from a client that stays up: how long until a clone runs and answers, what it costs in
//! memory, and what a live fork and a difference cost the VM.
//!
//! [`ours`] forks and measures; [`counts`] is about what that makes the kernel do; [`live`] is about
//! the VM that is forked while it runs; [`peers`] does with other VMMs' snapshots what can be done
//! with them.

mod counts;
mod live;
mod ours;
mod peers;

use std::time::Duration;

use anyhow::Result;

pub(super) use self::ours::ForkBench;
use self::ours::Way;
use crate::context::Context;
use crate::guests::Machine;
use crate::record::Record;

pub(crate) const ABOUT: &str =
    "forks, started and from standbys, beside other VMMs' snapshots; stages, memory, live fork";

/// How long an agent may take.
const LIMIT: Duration = Duration::from_secs(120);
/// How long clones rest before their memory is looked at.
const REST: Duration = Duration::from_secs(10);
/// Clones whose memory is compared with that of as many of other VMMs.
const COMPARED: usize = 10;

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "A tiny guest of 256 MiB with vsock, balloon and rng is booted once and made a template; each fork is asked for by a process that stays up and forks through the same code as `clone fork`. Other VMMs go on from snapshots of the same guest with counterparts of the same devices: Firecracker by its API's `/snapshot/load`, Cloud Hypervisor by its API's `vm.restore` in both its modes, on demand (userfaultfd; the rest of RAM comes in the background, which is waited for before the next) and copied (the default), QEMU by a migration from a `mapped-ram` file.",
        "Entered: from the request until the clone's first CPU enters the guest, by the clock that all processes of a host share. Running: until whoever asked knows it (for others: until their API has answered). Identity: from then until the clone's agent has taken name, machine id, seed and clock. Reply: from the request until an exec of `true` on a new connection has ended; for our clones the identity is in it, others' have none.",
        "Started: a new process for each clone, jailed, as the others' are not. Standby: one that was ready, taken one by one. First: without the record of what clones touch; the others with it.",
        "Memory: after 10 s of rest. PSS is what the kernel counts for the whole process, pages that several map shared out among them. Own: anonymous and swapped pages of the process, of which the guest's are named apart.",
        "Page faults and exits from the guest: of processes that were started for the fork, up to the first reply; exits where the kernel tells them (debugfs).",
        "Debian: the same with a stock Debian of 512 MiB on a disk.",
        "Live fork and difference: of a guest that writes to memory at the given rate.",
    ]);
    let tiny = Machine::standard(context, "vmlinux");
    let count = context.samples(COMPARED, 30);
    {
        let bench = ForkBench::new(context, "tiny", &tiny)?;
        let first = bench.series(&mut record, "started, first", Way::Start, count.min(10))?;
        bench.end(&first)?;
        bench.train()?;
        let started = bench.series(&mut record, "started", Way::Start, count)?;
        bench.end(&started)?;
        let warm = bench.series(&mut record, "standby", Way::Standby, count)?;
        bench.end(&warm[COMPARED..])?;
        bench.memory(&mut record, "idle clone", &warm[..COMPARED])?;
        bench.end(&warm[..COMPARED])?;
        bench.burst(&mut record, context.samples(10, 100))?;
        live::measure(&bench, &mut record, context.samples(3, 5))?;
    }
    let count = context.samples(COMPARED, 20);
    record.part("QEMU", |record| peers::qemu(context, &tiny, record, count));
    if let Some(program) = context.peer("firecracker") {
        record.part("Firecracker", |record| {
            peers::firecracker(context, program, &tiny, record, count)
        });
    }
    if let Some(program) = context.peer("cloud-hypervisor") {
        record.part("Cloud Hypervisor", |record| {
            peers::cloud_hypervisor(context, program, &tiny, record, count)
        });
    }
    record.part("Debian", |record| debian(context, record));
    Ok(record)
}

/// A real system, in growing numbers.
fn debian(context: &Context, record: &mut Record) -> Result<()> {
    let bench = ForkBench::new(context, "debian", &Machine::debian(context))?;
    bench.train()?;
    let first = bench.series(
        record,
        "Debian, started",
        Way::Start,
        context.samples(3, 10),
    )?;
    bench.end(&first)?;
    let counts: &[usize] = match context.samples(0, 1) {
        0 => &[1, 10],
        _ => &[1, 10, 100],
    };
    for &count in counts {
        let what = format!("Debian, {count} standbys");
        let clones = bench.series(record, &what, Way::Standby, count)?;
        bench.memory(record, &format!("one of {count} idle Debians"), &clones)?;
        bench.end(&clones)?;
    }
    Ok(())
}
