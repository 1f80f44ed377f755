//! Memory taken from and given back to a stock Linux guest, and random bytes for it.

use std::fs;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::rig::{Host, RAM, with_guest};
use clone_vmm::devices::balloon::{GuestRange, ReleaseRanges};

const MIB: u64 = 1 << 20;

#[test]
fn a_linux_guest_gives_memory_and_takes_it_back() {
    with_guest(|host| {
        freed_memory_returns_to_the_host(host);
        the_balloon_follows_its_target(host);
        statistics_arrive(host);
        free_pages_are_named_on_request(host);
        random_bytes_come_from_the_device(host);
    });
}

/// Memory of this process, guest RAM included, in bytes.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn the_balloon_follows_its_target(host: &Host) {
    let before = host.meminfo("MemFree");
    host.balloon().set_target_bytes(64 * MIB);
    host.until("the balloon is full", || {
        host.balloon().actual_bytes() == 64 * MIB
    });
    let during = host.meminfo("MemFree");
    assert!(during + 48 * MIB < before, "{before} -> {during}");
    host.balloon().set_target_bytes(0);
    host.until("the balloon is empty", || {
        host.balloon().actual_bytes() == 0
    });
    let after = host.meminfo("MemFree");
    assert!(after > during + 48 * MIB, "{during} -> {after}");
}

fn statistics_arrive(host: &Host) {
    let second = Duration::from_secs(1);
    host.balloon().set_stats_interval(second).unwrap();
    host.until("statistics", || host.balloon().stats().is_some());
    let (stats, _) = host.balloon().stats().unwrap();
    let total = stats.total_memory.unwrap();
    assert!(total <= RAM && total > RAM / 2, "{stats:?}");
    host.until("newer statistics", || {
        let age = host.balloon().stats().unwrap().1;
        age < second / 4
    });
    host.balloon().set_stats_interval(Duration::ZERO).unwrap();
}

fn freed_memory_returns_to_the_host(host: &Host) {
    let mut stream = host.ask("touch 83886080");
    let mut word = [0; 8];
    stream.read_exact(&mut word).unwrap();
    let touched = resident();
    stream.write_all(b"free\n").unwrap();
    stream.read_exact(&mut word[..6]).unwrap();
    host.until("freed pages are reported", || {
        resident() + 60 * MIB < touched
    });
}

/// Counts the bytes it is given.
struct Count(Arc<Mutex<u64>>);

impl ReleaseRanges for Count {
    fn release(&mut self, ranges: &[GuestRange]) -> io::Result<()> {
        *self.0.lock().unwrap() += ranges.iter().map(|range| range.len).sum::<u64>();
        Ok(())
    }
}

fn free_pages_are_named_on_request(host: &Host) {
    for _ in 0..2 {
        let free = host.meminfo("MemFree");
        let count = Arc::new(Mutex::new(0));
        let sink = Box::new(Count(Arc::clone(&count)));
        assert!(host.balloon().start_hinting(sink));
        host.until("all free pages are named", || {
            host.balloon().hinting_is_complete()
        });
        host.balloon().stop_hinting();
        // Only large blocks are named, so not quite all.
        let named = *count.lock().unwrap();
        assert!(named > free / 2 && named <= RAM, "{named} of {free}");
        host.until("the guest uses its pages again", || {
            host.meminfo("MemFree") > free / 2
        });
    }
}

fn random_bytes_come_from_the_device(host: &Host) {
    let current = host.answer("read /sys/class/misc/hw_random/rng_current 100");
    assert!(current.starts_with(b"virtio_rng"), "{current:?}");
    let first = host.answer("read /dev/hwrng 64");
    assert_eq!(first.len(), 64);
    assert_ne!(first, host.answer("read /dev/hwrng 64"));
}
