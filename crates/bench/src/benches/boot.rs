//! From starting the VMM to the guest's first line of user space.

use std::time::Duration;

use anyhow::Result;

use crate::context::Context;
use crate::guests::{CloneVm, Machine, Qemu, cloud_hypervisor, firecracker};
use crate::record::{Figure, Record};

pub(crate) const ABOUT: &str = "start to the guest's first user-space line, beside other VMMs";

/// A kernel file's name, and whether the machine has devices beside the console.
const KINDS: [(&str, bool); 3] = [("bzImage", true), ("vmlinux", true), ("vmlinux", false)];

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "From before the VMM's process is started until the guest's first line from user space is read from its console.",
        "Same kernel, RAM disk, command line (quiet), 256 MiB and 1 vCPU for all; with vsock, balloon and rng, or bare: with none of them.",
        "Cloud Hypervisor always has the rng, and its command line goes without `i8042.nopnp`, which would have its guest wait a second for a keyboard controller that it has not.",
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

/// Another VMM, and its boots.
struct Peer<'a> {
    name: &'static str,
    goal: Option<&'static str>,
    boot: Box<dyn Fn() -> Result<Duration> + 'a>,
    times: Vec<Duration>,
}

impl<'a> Peer<'a> {
    fn new(
        name: &'static str,
        goal: Option<&'static str>,
        boot: impl Fn() -> Result<Duration> + 'a,
    ) -> Self {
        Self {
            name,
            goal,
            boot: Box::new(boot),
            times: Vec::new(),
        }
    }
}

/// Those that are there, and take such a kernel.
fn peers<'a>(context: &'a Context, kernel: &str, machine: &'a Machine) -> Vec<Peer<'a>> {
    let goal = Some("at most 1");
    let mut peers = vec![Peer::new("QEMU", goal, || Qemu::boot(context, machine))];
    // It takes uncompressed kernels only.
    if let Some(program) = context.peer("firecracker")
        && kernel == "vmlinux"
    {
        let boot = || firecracker::boot(context, program, machine);
        peers.push(Peer::new("Firecracker", goal, boot));
    }
    if let Some(program) = context.peer("cloud-hypervisor") {
        let boot = || cloud_hypervisor::boot(context, program, machine);
        peers.push(Peer::new("Cloud Hypervisor", None, boot));
    }
    peers
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
    let mut peers = peers(context, kernel, machine);
    let mut ours = Vec::new();
    for run in 0..=runs {
        let keep = |times: &mut Vec<Duration>, time| {
            if run > 0 {
                times.push(time);
            }
        };
        keep(&mut ours, CloneVm::boot(context, machine)?);
        for peer in &mut peers {
            let booted = record.twice(peer.name, &peer.boot)?;
            keep(&mut peer.times, booted);
        }
    }
    record.add(Figure::ms(&named("clone"), &ours));
    for peer in &peers {
        record.add(Figure::ms(&named(peer.name), &peer.times));
        record.ratio(&named("clone"), &named(peer.name), peer.goal)?;
    }
    Ok(())
}
