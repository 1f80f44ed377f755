//! Kernels: bzImage headers, compressed payloads, ELF files.
#![no_main]

use clone_image::kernel::fuzz_vmlinux;

/// What an unpacked kernel may take.
const LIMIT: u64 = 1 << 20;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = fuzz_vmlinux(bytes, LIMIT);
});
