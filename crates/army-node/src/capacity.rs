//! What the host has, and how much of it is left.

use std::fs;
use std::path::Path;

use army_api::hosts::Capacity;

/// Measures the host: the file systems of the templates and of the runtime directory among the rest.
/// What VMs use is added by the caller.
pub fn measure(templates: &Path, runtime: &Path) -> Capacity {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let memory = text("/proc/meminfo");
    let load = text("/proc/loadavg");
    let load: f64 = first(&load)
        .and_then(|word| word.parse().ok())
        .unwrap_or(0.0);
    Capacity {
        cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as u32),
        load_milli: (load * 1000.0) as u32,
        memory_bytes: field(&memory, "MemTotal:"),
        available_bytes: field(&memory, "MemAvailable:"),
        disk_free_bytes: free(templates).unwrap_or(0),
        run_free_bytes: free(runtime),
        ..Capacity::default()
    }
}

fn first(text: &str) -> Option<&str> {
    text.split_whitespace().next()
}

/// A figure of /proc/meminfo in bytes; 0 where the kernel does not provide it.
fn field(memory: &str, name: &str) -> u64 {
    let line = memory.lines().find_map(|line| line.strip_prefix(name));
    let kib = line
        .and_then(first)
        .and_then(|word| word.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The free space of the file system where a directory is or will be, in bytes. `None` where it cannot
/// be told; a tmpfs without a limit has no blocks.
fn free(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|path| path.exists())?;
    let found = rustix::fs::statvfs(there).ok()?;
    (found.f_blocks > 0).then_some(found.f_bavail * found.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_has_capacity() {
        let capacity = measure(Path::new("/nowhere/at/all"), Path::new("/nowhere"));
        assert!(capacity.cpus > 0);
        assert!(capacity.memory_bytes >= capacity.available_bytes);
        assert!(capacity.available_bytes > 0);
        assert!(capacity.disk_free_bytes > 0);
        assert!(capacity.run_free_bytes > Some(0));
        assert_eq!(field("MemTotal:  12 kB\nMemFree: 3 kB", "MemFree:"), 3072);
        assert_eq!(field("", "MemFree:"), 0);
    }
}
