//! Facts about the guest: its kernel, memory, load and uptime.

use std::fs;
use std::time::Duration;

use agent_proto::messages::Info;

/// Reads the facts from the kernel. A missing one is 0.
pub(crate) fn gather(commands: u32, idle: Duration) -> Info {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let system = rustix::system::uname();
    let clock = clone_base::clock::since_1970();
    Info {
        hostname: system.nodename().to_string_lossy().into_owned(),
        kernel: system.release().to_string_lossy().into_owned(),
        uptime_ms: first_number("/proc/uptime", 1000.0) as u64,
        memory_total: kilobytes(&meminfo, "MemTotal:"),
        memory_available: kilobytes(&meminfo, "MemAvailable:"),
        load_milli: first_number("/proc/loadavg", 1000.0) as u32,
        commands,
        idle_ms: idle.as_millis() as u64,
        clock_ns: clock.as_nanos() as u64,
    }
}

fn first_number(path: &str, scale: f64) -> f64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let number = text
        .split_whitespace()
        .next()
        .and_then(|word| word.parse::<f64>().ok());
    number.unwrap_or(0.0) * scale
}

/// A line of `/proc/meminfo`, in bytes.
fn kilobytes(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}
