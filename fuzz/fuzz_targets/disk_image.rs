//! The headers and tables of qcow2 images and of our own layers.
#![no_main]

use clone_disk::{Disk, DiskFiles, EngineKind, Format, Qcow2Header, WriteFile};
use clone_fuzz::file;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = Qcow2Header::read(&file(bytes));
    let files = |base, layers| DiskFiles {
        base,
        backing: Vec::new(),
        layers,
        writes: WriteFile::Refused,
    };
    // Refused or opened: it must not panic, hang, or take much memory.
    let qcow2 = files(Some((file(bytes), Format::Qcow2)), Vec::new());
    let _ = Disk::open(qcow2, EngineKind::Blocking);
    let layer = files(None, vec![file(bytes)]);
    let _ = Disk::open(layer, EngineKind::Blocking);
});
