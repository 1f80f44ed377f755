//! The balloon's queues: inflation, deflation, statistics, hints, reports.
#![no_main]

use std::io;

use clone_fuzz::{Step, drive};
use clone_vmm::devices::balloon::{Balloon, BalloonOffer, GuestRange, ReleaseRanges};

/// Gives nothing back, but looks at what it is told to.
struct Looks;

impl ReleaseRanges for Looks {
    fn release(&mut self, ranges: &[GuestRange]) -> io::Result<()> {
        std::hint::black_box(format!("{ranges:?}"));
        Ok(())
    }
}

libfuzzer_sys::fuzz_target!(|steps: Vec<Step>| {
    let device = Balloon::new(Box::new(Looks), BalloonOffer::default());
    drive(device.expect("a device"), steps);
});
