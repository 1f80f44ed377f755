//! The virtio-fs device's queues, with a server that never answers.
#![no_main]

use clone_fuzz::{Step, drive};
use clone_vmm::devices::fs::Fs;

libfuzzer_sys::fuzz_target!(|steps: Vec<Step>| {
    let (device, server) = clone_fuse::link::pair().expect("a socket");
    drive(Fs::new("fuzz", device).expect("a device"), steps);
    drop(server);
});
