//! From starting the VMM to the guest's first line of user space.

use std::time::Duration;

use anyhow::Result;

use crate::context::Context;
use crate::guests::{CloneVm, Firecracker, Machine, Qemu};
use crate::record::{Figure, Record};

pub(crate) const ABOUT: &str = "start to the guest's first user-space line, beside QEMU microvm";

/// A kernel file's name, and whether the machine has devices beside the console.
const KINDS: [(&str, bool); 3] = [("bzImage", true), ("vmlinux", true), ("vmlinux", false)];

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "From before the VMM's process is started until the guest's first line from user space is read from its console.",
        "Same kernel, RAM disk, command line (quiet), 256 MiB and 1 vCPU for all; with vsock, balloon and rng, or bare: with none of them.",
        "VMMs take turns; one boot of each comes before the first that counts, so that all files are in memory.",
    ]);
    let runs = context.runs(3, 10);
    let kinds = if runs > 3 { &KINDS[..] } else { &KINDS[..2] };
    for &(kernel, standard_devices) in kinds {
        let machine = Machine {
            standard_devices,
            ..Machine::standard(context, kernel)
        };
        one_kind(context, &mut record, kernel, &machine, runs)?;
    }
    Ok(record)
}

fn one_kind(
    context: &Context,
    record: &mut Record,
    kernel: &str,
    machine: &Machine,
    runs: usize,
) -> Result<()> {
    let bare = if machine.standard_devices {
        ""
    } else {
        ", bare"
    };
    let named = |vmm: &str| format!("{vmm} {kernel}{bare}");
    // It takes uncompressed kernels only.
    let firecracker = context.peer("firecracker").filter(|_| kernel == "vmlinux");
    let (mut ours, mut qemus, mut firecrackers) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..=runs {
        let keep = |times: &mut Vec<Duration>, time| {
            if run > 0 {
                times.push(time);
            }
        };
        keep(&mut ours, CloneVm::boot(context, machine)?);
        let booted = record.twice("QEMU", || Qemu::boot(context, machine))?;
        keep(&mut qemus, booted);
        if let Some(program) = firecracker {
            let time = Firecracker::boot(context, program, machine)?;
            keep(&mut firecrackers, time);
        }
    }
    record.add(Figure::ms(&named("clone"), &ours));
    record.add(Figure::ms(&named("QEMU"), &qemus));
    record.ratio(&named("clone"), &named("QEMU"), Some("at most 1"))?;
    if firecracker.is_some() {
        record.add(Figure::ms(&named("Firecracker"), &firecrackers));
        record.ratio(&named("clone"), &named("Firecracker"), Some("at most 1"))?;
    }
    Ok(())
}
