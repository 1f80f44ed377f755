//! A disk, seen from the guest.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::guests::{CloneVm, Guest, Machine, Qemu, measure, put_program, wait_for_agent};
use crate::record::{Figure, Record};

pub(crate) const ABOUT: &str =
    "4 KiB random latency and sequential throughput of a raw disk, beside QEMU's virtio-blk";

const DISK_MIB: usize = 64;
/// What one sequential pass moves.
const PASS_MIB: &str = "64";

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "A program in the guest reads and writes /dev/vda past the page cache: 4 KiB at random places one after the other, and 1 MiB in sequence, one at a time.",
        "The disk is a raw image of 64 MiB in the host's memory (tmpfs), one for each VMM and alike; QEMU uses cache=none, aio=io_uring. So the VMM's own cost is seen, not a disk's.",
        "The two guests run at the same time and are measured in turns.",
    ]);
    let machine = |name: &str| -> Result<Machine> {
        let disk = context.scratch(name);
        image(&disk)?;
        Ok(Machine {
            disk: Some(disk),
            ..Machine::standard(context, "vmlinux")
        })
    };
    let ours = CloneVm::start(context, "block", &machine("clone.img")?)?;
    let qemu = Qemu::start(context, &machine("qemu.img")?)?;
    let guests: [(&str, &dyn Guest); 2] = [("clone", &ours), ("QEMU", &qemu)];
    for (name, guest) in guests {
        wait_for_agent(guest).context(name)?;
        put_program(guest, context).context(name)?;
    }
    let count = context.samples(200, 1000).to_string();
    for way in ["read", "write"] {
        let mut latencies = [Vec::new(), Vec::new()];
        let mut speeds = [Vec::new(), Vec::new()];
        for _ in 0..context.samples(3, 5) {
            for (index, (_, guest)) in guests.iter().enumerate() {
                let times = measure(*guest, &["block-latency", way, "/dev/vda", &count])?;
                latencies[index].extend(times.iter().map(|ns| ns / 1e3));
                let speed = measure(*guest, &["block-throughput", way, "/dev/vda", PASS_MIB])?;
                speeds[index].extend(speed.iter().map(|bytes| bytes / f64::from(1 << 20)));
            }
        }
        for ((name, _), samples) in guests.iter().zip(latencies) {
            record.add(Figure::new(&format!("{name} {way} 4 KiB"), "us", samples));
        }
        for ((name, _), samples) in guests.iter().zip(speeds) {
            record.add(Figure::new(
                &format!("{name} {way} in sequence"),
                "MiB/s",
                samples,
            ));
        }
        record.ratio(
            &format!("clone {way} 4 KiB"),
            &format!("QEMU {way} 4 KiB"),
            None,
        )?;
        let in_sequence = |vmm: &str| format!("{vmm} {way} in sequence");
        record.ratio(
            &in_sequence("clone"),
            &in_sequence("QEMU"),
            Some("more is better"),
        )?;
    }
    Ok(record)
}

/// An image without holes.
fn image(path: &Path) -> Result<()> {
    fs::write(path, vec![0xA5; DISK_MIB << 20])
        .with_context(|| format!("cannot write {}", path.display()))
}
