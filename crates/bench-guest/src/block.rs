//! A block device past the page cache: random blocks one after the other, and long runs.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::slice;
use std::time::Instant;

/// What a random access moves.
const BLOCK: usize = 4096;
/// What a sequential access moves.
const RUN: usize = 1 << 20;
/// What direct I/O asks of a buffer's address.
const ALIGNMENT: usize = 4096;

/// Nanoseconds of each of `count` random accesses of 4 KiB.
pub(crate) fn latency(way: &str, path: &str, count: u64) -> io::Result<Vec<u64>> {
    let (device, len) = open(path, way)?;
    let buffer = aligned(BLOCK);
    let blocks = (len / BLOCK as u64).max(1);
    let mut seed = 0x9E37_79B9_7F4A_7C15;
    let mut times = Vec::new();
    for _ in 0..count {
        let at = random(&mut seed) % blocks * BLOCK as u64;
        let start = Instant::now();
        access(&device, way, buffer, at)?;
        times.push(start.elapsed().as_nanos() as u64);
    }
    Ok(times)
}

/// Bytes a second of `mib` MiB in accesses of 1 MiB, from the device's start and round again.
pub(crate) fn throughput(way: &str, path: &str, mib: u64) -> io::Result<Vec<u64>> {
    let (device, len) = open(path, way)?;
    let buffer = aligned(RUN);
    let runs = (len / RUN as u64).max(1);
    let start = Instant::now();
    for run in 0..mib {
        access(&device, way, buffer, run % runs * RUN as u64)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(vec![(mib as f64 * RUN as f64 / seconds) as u64])
}

fn access(device: &File, way: &str, buffer: &mut [u8], at: u64) -> io::Result<()> {
    match way {
        "read" => device.read_exact_at(buffer, at),
        _ => device.write_all_at(buffer, at),
    }
}

/// The device and its length in bytes.
fn open(path: &str, way: &str) -> io::Result<(File, u64)> {
    if !["read", "write"].contains(&way) {
        return Err(io::Error::other(format!("{way} is neither read nor write")));
    }
    let mut device = OpenOptions::new()
        .read(true)
        .write(way == "write")
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let len = io::Seek::seek(&mut device, io::SeekFrom::End(0))?;
    Ok((device, len))
}

/// Memory that direct I/O takes; never given back, as the process is short.
fn aligned(len: usize) -> &'static mut [u8] {
    // Both constants fit: the alignment is a power of two and the sizes are small.
    let Ok(layout) = Layout::from_size_align(len, ALIGNMENT) else {
        return &mut [];
    };
    // SAFETY: the layout's size is not 0.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        handle_alloc_error(layout);
    }
    // SAFETY: the memory is ours alone, zeroed, that long, and never freed.
    unsafe { slice::from_raw_parts_mut(memory, len) }
}

/// xorshift: the same walk in every guest.
fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_measured_as_a_device_and_other_ways_are_refused() {
        // Beside the test program: a file system with direct I/O, which /tmp may not be.
        let path = std::env::current_exe().unwrap().with_extension("disk");
        std::fs::write(&path, vec![0; 2 << 20]).unwrap();
        let path = path.to_str().unwrap();
        for way in ["read", "write"] {
            assert_eq!(latency(way, path, 9).unwrap().len(), 9);
            assert!(throughput(way, path, 4).unwrap()[0] > 0);
        }
        assert_eq!(std::fs::metadata(path).unwrap().len(), 2 << 20);
        assert!(latency("erase", path, 1).is_err());
        std::fs::remove_file(path).unwrap();
    }
}
