//! The block device's queue, over an image in memory with a copy-on-write layer.
#![no_main]

use std::sync::{Arc, Mutex};

use clone_disk::{Disk, DiskFiles, EngineKind, Format, WriteFile};
use clone_fuzz::{Step, drive, file};
use clone_vmm::devices::block::{Block, BlockConfig};

libfuzzer_sys::fuzz_target!(|steps: Vec<Step>| {
    let files = DiskFiles {
        base: Some((file(&[0xA5; 64 << 10]), Format::Raw)),
        backing: Vec::new(),
        layers: Vec::new(),
        writes: WriteFile::Layer {
            file: file(&[]),
            durable: false,
        },
    };
    let disk = Disk::open(files, EngineKind::Uring).expect("a sound disk");
    let device = Block::new(Arc::new(Mutex::new(disk)), &BlockConfig::default());
    drive(device.expect("a device"), steps);
});
