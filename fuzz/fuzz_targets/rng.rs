//! The source of random numbers' queue.
#![no_main]

use clone_fuzz::{Step, drive};
use clone_vmm::devices::rng::Rng;

libfuzzer_sys::fuzz_target!(|steps: Vec<Step>| {
    drive(Rng::new(None).expect("a device"), steps);
});
