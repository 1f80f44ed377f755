//! What a live fork and a difference cost the VM that they are of.

use std::time::{Duration, Instant};

use anyhow::Result;
use clone_host::launch::fork::{Overrides, Source, fork};

use super::ours::ForkBench;
use crate::guests::{exec, told};
use crate::record::{Figure, Record};

/// What the guest changes between snapshots, in MiB for each second.
const DIRTY_RATES: [u32; 3] = [0, 4, 32];

pub(super) fn measure(bench: &ForkBench<'_>, record: &mut Record, runs: usize) -> Result<()> {
    for rate in DIRTY_RATES {
        dirty(bench, rate)?;
        let (mut pauses, mut copied) = (Vec::new(), Vec::new());
        for number in 0..runs {
            let vm = bench.runtime.find(bench.base.name()).map_err(told)?;
            let (source, taken) = Source::live(&bench.runtime, &vm).map_err(told)?;
            let names = [format!("l{rate}-{number}")];
            let forked = fork(&bench.runtime, &source, &names, &Overrides::default(), true);
            let forked = forked.into_iter().collect::<Result<Vec<_>, _>>();
            bench.end(&forked.map_err(told)?)?;
            pauses.push(Duration::from_micros(taken.times.pause_us));
            copied.push(taken.times.last_copy_bytes as f64 / 1024.0);
        }
        let what = format!("live fork, {rate} MiB/s written");
        record.add(Figure::ms(&format!("{what}: pause"), &pauses));
        record.add(Figure::new(&format!("{what}: copied in it"), "KiB", copied));
    }
    dirty(bench, 0)?;
    let (mut sizes, mut times) = (Vec::new(), Vec::new());
    bench.snapshot("full", false)?;
    for number in 0..runs {
        std::thread::sleep(Duration::from_secs(1));
        let start = Instant::now();
        let taken = bench.snapshot(&format!("diff{number}"), true)?;
        times.push(start.elapsed());
        sizes.push(taken.memory_bytes as f64 / 1024.0);
    }
    let what = "difference of an idle guest";
    record.add(Figure::new(&format!("{what}: memory"), "KiB", sizes));
    record.add(Figure::ms(&format!("{what}: time"), &times));
    Ok(())
}

/// Has the guest write so many MiB each second from now on.
fn dirty(bench: &ForkBench<'_>, rate: u32) -> Result<()> {
    let stop = "[ -f /run/writer ] && kill $(cat /run/writer); rm -f /run/writer";
    exec(&bench.base, &["sh", "-c", &format!("{stop}; true")])?;
    if rate > 0 {
        let write = format!(
            "(while :; do dd if=/dev/zero of=/run/dirty bs=64k count={} conv=notrunc 2>/dev/null; \
             usleep 100000; done) >/dev/null 2>&1 </dev/null & echo $! > /run/writer",
            rate * 16 / 10
        );
        exec(&bench.base, &["sh", "-c", &write])?;
    }
    Ok(())
}
