//! What a VMM itself takes of memory for a VM.

use std::fs;

use anyhow::{Context as _, Result};

use super::net::Tap;
use crate::context::Context;
use crate::guests::{CloneVm, Guest, MEMORY_MIB, Machine, Qemu, exec, wait_for_agent};
use crate::record::{Figure, Ratio, Record};

pub(crate) const ABOUT: &str = "the VMM's own private memory for a VM with all devices";

/// What a VM of ours may take.
const GOAL_KIB: f64 = 2048.0;
/// Our parts that are listed.
const PARTS: usize = 6;
/// Execs before it is measured: a VM that has done something.
const EXECS: usize = 20;

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "Private memory (clean and dirty, and swapped) of all mappings in /proc/PID/smaps but the guest's RAM, after 20 execs.",
        "All devices: a disk, an interface with vhost-net, vsock, balloon, rng. Two VMs of ours run, so that pages of the program's file, which all VMs share, do not count.",
        "Not counted: what the kernel keeps for KVM and vhost. QEMU runs once, so pages of its file count as private; its dirty memory is given beside.",
    ]);
    let (mut ours, mut qemus) = (Vec::new(), Vec::new());
    let mut qemu_dirty = Vec::new();
    let mut parts = Vec::new();
    let twin = Machine::standard(context, "vmlinux");
    let twin = CloneVm::start(context, "twin", &twin)?;
    wait_for_agent(&twin).context("the second VM")?;
    for _ in 0..context.runs(1, 5) {
        let tap = Tap::new("clonebench0", "10.217.0.1/24")?;
        let machine = machine(context, &tap)?;
        let vm = CloneVm::start(context, "memory", &machine)?;
        parts = used(&vm).context("our VM")?;
        ours.push(parts.iter().map(|part| part.private_kib).sum());
        drop(vm);
        let qemu = Qemu::start(context, &machine)?;
        let parts = used(&qemu).context("QEMU's machine")?;
        qemus.push(parts.iter().map(|part| part.private_kib).sum());
        qemu_dirty.push(parts.iter().map(|part| part.dirty_kib).sum());
    }
    record.add(Figure::new("clone", "KiB", ours));
    record.add(Figure::new("QEMU", "KiB", qemus));
    record.add(Figure::new("QEMU, dirty only", "KiB", qemu_dirty));
    record.ratio("clone", "QEMU", None)?;
    record.ratio("clone", "QEMU, dirty only", None)?;
    let value = record
        .figures
        .first()
        .map_or(f64::INFINITY, |ours| ours.p50)
        / GOAL_KIB;
    record.add_ratio(Ratio {
        name: "clone / 2 MiB".to_owned(),
        value,
        goal: Some("at most 1".to_owned()),
    });
    parts.sort_by(|a, b| b.private_kib.total_cmp(&a.private_kib));
    let largest = parts.iter().take(PARTS);
    let largest = largest.map(|part| format!("{} {} KiB", part.name, part.private_kib));
    let largest: Vec<String> = largest.collect();
    record
        .how
        .push(format!("Our largest parts: {}.", largest.join(", ")));
    Ok(record)
}

fn machine(context: &Context, tap: &Tap) -> Result<Machine> {
    let disk = context.scratch("memory.img");
    fs::write(&disk, vec![0; 16 << 20])?;
    Ok(Machine {
        disk: Some(disk),
        tap: Some(tap.name.clone()),
        ..Machine::standard(context, "vmlinux")
    })
}

fn used(guest: &dyn Guest) -> Result<Vec<Part>> {
    wait_for_agent(guest)?;
    for _ in 0..EXECS {
        exec(guest, &["true"])?;
    }
    let path = format!("/proc/{}/smaps", guest.pid());
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let parts = parse(&text);
    // A guest's RAM is one mapping at this size; nothing else comes near it.
    let ram = parts.iter().filter(|part| part.size_kib >= RAM_KIB);
    anyhow::ensure!(ram.count() == 1, "{path} does not show one mapping of RAM");
    Ok(parts
        .into_iter()
        .filter(|part| part.size_kib < RAM_KIB)
        .collect())
}

const RAM_KIB: f64 = (MEMORY_MIB << 10) as f64;

/// A mapping.
#[derive(Debug, PartialEq)]
struct Part {
    name: String,
    size_kib: f64,
    private_kib: f64,
    dirty_kib: f64,
}

fn parse(smaps: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(key) = first.strip_suffix(':') else {
            let access = words.next().unwrap_or_default();
            let name = words.nth(3).unwrap_or("anonymous");
            parts.push(Part {
                name: format!("{} {access}", name.rsplit('/').next().unwrap_or(name)),
                size_kib: 0.0,
                private_kib: 0.0,
                dirty_kib: 0.0,
            });
            continue;
        };
        let value = words.next().and_then(|word| word.parse::<f64>().ok());
        let (Some(part), Some(value)) = (parts.last_mut(), value) else {
            continue;
        };
        match key {
            "Size" => part.size_kib = value,
            "Private_Clean" => part.private_kib += value,
            "Private_Dirty" | "Swap" => {
                part.private_kib += value;
                part.dirty_kib += value;
            }
            _ => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart_with_their_private_memory() {
        let parts = parse(
            "55d0-55d1 r-xp 00000000 fe:00 12 /usr/bin/clone\nSize: 40 kB\nRss: 30 kB\n\
             Private_Clean: 8 kB\nPrivate_Dirty: 4 kB\nSwap: 2 kB\nVmFlags: rd ex\n\
             7f00-7f10 rw-p 00000000 00:00 0 \nSize: 262144 kB\nPrivate_Dirty: 900 kB\n",
        );
        let part = |name: &str, size_kib, private_kib, dirty_kib| Part {
            name: name.to_owned(),
            size_kib,
            private_kib,
            dirty_kib,
        };
        let expected = [
            part("clone r-xp", 40.0, 14.0, 6.0),
            part("anonymous rw-p", 262_144.0, 900.0, 900.0),
        ];
        assert_eq!(parts, expected);
    }
}
