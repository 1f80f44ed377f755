//! Placement in a simulated fleet: how many a second, and how evenly. `cargo xtask bench place`
//! starts it; it prints its record, and writes it where its argument says.
//!
//! 1,000 hosts of four sizes get 100,000 VMs of 50 templates, asked for in bursts of 1 to 64. What a
//! VM really costs is up to half more or less than what its template's clones cost on average, and
//! is seen when hosts are measured, after every thousand VMs. A template begins on one host, and is
//! then on each host that was chosen for it.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::collections::HashSet;
use std::time::{Duration, Instant};

use army::scheduler::{HostView, Need, place};
use serde_json::json;

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

fn main() {
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
        };
        let start = Instant::now();
        let chosen = place(&mut hosts, need, count as u32).unwrap();
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
    let mut shares: Vec<f64> = hosts
        .iter()
        .zip(&used)
        .map(|(host, used)| 100.0 * *used as f64 / host.memory_bytes as f64)
        .collect();
    shares.sort_by(f64::total_cmp);
    let at = |percent: usize| shares[(shares.len() - 1) * percent / 100];
    let copies: usize = holders.iter().map(HashSet::len).sum();
    let rate = VMS as f64 / time.as_secs_f64();
    let (median, fullest) = (at(50), at(100));
    // As the other benches write theirs.
    let figure = |name: &str, unit: &str, sorted: &[f64]| {
        let at = |percent: usize| sorted[(sorted.len() - 1) * percent / 100];
        json!({
            "name": name, "unit": unit, "n": sorted.len(),
            "p50": at(50), "p99": at(99), "min": at(0), "samples": sorted,
        })
    };
    let record = json!({
        "how": [
            format!("A simulated fleet of {HOSTS} hosts of four sizes gets {VMS} VMs of {TEMPLATES} templates in {requests} requests."),
            "What a VM really costs differs from what is expected, and is seen when hosts are measured.",
        ],
        "figures": [
            figure("placements", "1/s", &[rate.round()]),
            figure("memory used, of each host", "%", &shares),
            figure("hosts with a template, mean", "hosts", &[copies as f64 / TEMPLATES as f64]),
        ],
        "ratios": [
            {"name": "placements a second / 20,000", "value": rate / 20_000.0, "goal": "at least 1"},
            {"name": "memory used, fullest host / median", "value": fullest / median, "goal": "within a few percent of 1"},
        ],
    });
    let text = serde_json::to_string_pretty(&record).unwrap();
    println!("placements: {rate:.0}/s");
    println!(
        "memory used, of each host: {:.1} to {fullest:.1} %, median {median:.1}",
        at(0)
    );
    // Cargo adds flags of its own.
    if let Some(path) = std::env::args()
        .skip(1)
        .find(|word| !word.starts_with("--"))
    {
        std::fs::write(path, text).unwrap();
    }
}
