//! Memory that is written at a given rate.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// How often some pages are written.
const STEP: Duration = Duration::from_millis(5);

/// Writes one word in each page of `mib` MiB, over and over, at `rate` MiB of pages a second. Ends
/// only by a signal.
pub(crate) fn write(mib: u64, rate: u64) -> io::Result<Vec<u64>> {
    let mut memory = vec![0_u8; (mib << 20) as usize];
    let pages = memory.len() / PAGE;
    if pages == 0 {
        return Err(io::Error::other("it needs some memory"));
    }
    let (start, mut written) = (Instant::now(), 0_u64);
    loop {
        let due = (start.elapsed().as_secs_f64() * (rate << 20) as f64 / PAGE as f64) as u64;
        while written < due {
            let at = (written % pages as u64) as usize * PAGE;
            memory[at..at + 8].copy_from_slice(&written.to_le_bytes());
            // Otherwise nobody ever reads what is written.
            std::hint::black_box(&memory);
            written += 1;
        }
        thread::sleep(STEP);
    }
}
