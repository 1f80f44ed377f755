//! Placement in a simulated fleet: how many a second, and how evenly. It needs no guests.
//!
//! 1,000 hosts of four sizes get 100,000 VMs of 50 templates, asked for in bursts of 1 to 64. What a
//! VM really costs is up to half more or less than what its template's clones cost on average, and
//! is seen when hosts are measured, after every thousand VMs. A template begins on one host, and is
//! then on each host that was chosen for it.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use army_controller::scheduler::{HostView, Need, place};

use crate::context::Context;
use crate::record::{Figure, Ratio, Record};

pub(crate) const ABOUT: &str = "placement in a simulated fleet; needs no guests";

const HOSTS: usize = 1000;
const VMS: usize = 100_000;
const TEMPLATES: usize = 50;
const MEASURED_EVERY: usize = 1000;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SIZES: [u64; 4] = [64 * GIB, 128 * GIB, 256 * GIB, 512 * GIB];

/// The same numbers each time (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

pub(crate) fn run(_: &Context) -> Result<Record> {
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    let mut hosts: Vec<HostView> = (0..HOSTS)
        .map(|index| HostView {
            name: format!("host-{index}"),
            open: true,
            suits: true,
            cpus: (SIZES[index % 4] / (4 * GIB)) as u32,
            memory_bytes: SIZES[index % 4],
            available_bytes: SIZES[index % 4],
            ..HostView::default()
        })
        .collect();
    let costs: Vec<u64> = (0..TEMPLATES)
        .map(|_| (16 + numbers.below(1500)) * MIB)
        .collect();
    let mut holders: Vec<HashSet<usize>> = (0..TEMPLATES)
        .map(|_| HashSet::from([numbers.below(HOSTS as u64) as usize]))
        .collect();
    let mut used = vec![0_u64; HOSTS];
    let (mut placed, mut measured, mut requests) = (0, 0, 0_u32);
    let mut time = Duration::ZERO;
    while placed < VMS {
        let template = numbers.below(TEMPLATES as u64) as usize;
        let count = (1 + numbers.below(64) as usize).min(VMS - placed);
        for (index, host) in hosts.iter_mut().enumerate() {
            host.has_template = holders[template].contains(&index);
        }
        let need = Need {
            cost_bytes: costs[template],
            anywhere: true,
            ..Need::default()
        };
        let start = Instant::now();
        let chosen = place(&mut hosts, need, count as u32).map_err(|full| anyhow!("{full:?}"))?;
        time += start.elapsed();
        requests += 1;
        for index in chosen {
            holders[template].insert(index);
            used[index] += costs[template] / 2 + numbers.below(costs[template]);
        }
        placed += count;
        if placed - measured >= MEASURED_EVERY {
            measured = placed;
            for (host, used) in hosts.iter_mut().zip(&used) {
                host.available_bytes = host.memory_bytes.saturating_sub(*used);
            }
        }
    }
    let shares: Vec<f64> = hosts
        .iter()
        .zip(&used)
        .map(|(host, used)| 100.0 * *used as f64 / host.memory_bytes as f64)
        .collect();
    let copies: usize = holders.iter().map(HashSet::len).sum();
    let rate = VMS as f64 / time.as_secs_f64();
    let mut record = Record::new(&[
        &format!(
            "A simulated fleet of {HOSTS} hosts of four sizes gets {VMS} VMs of {TEMPLATES} templates in {requests} requests."
        ),
        "What a VM really costs differs from what is expected, and is seen when hosts are measured.",
    ]);
    record.add(Figure::new("placements", "1/s", vec![rate.round()]));
    let used = Figure::new("memory used, of each host", "%", shares);
    let fullest = used.samples.iter().copied().fold(0.0, f64::max);
    record.add_ratio(Ratio {
        name: "placements a second / 20,000".to_owned(),
        value: rate / 20_000.0,
        goal: Some("at least 1".to_owned()),
    });
    record.add_ratio(Ratio {
        name: "memory used, fullest host / median".to_owned(),
        value: fullest / used.p50,
        goal: Some("within a few percent of 1".to_owned()),
    });
    record.add(used);
    let mean = copies as f64 / TEMPLATES as f64;
    record.add(Figure::new(
        "hosts with a template, mean",
        "hosts",
        vec![mean],
    ));
    Ok(record)
}
