//! The index of a memory layer.
#![no_main]

use clone_fuzz::file;
use clone_memory::layers::Layer;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(layer) = Layer::open(file(bytes), "fuzzed") {
        let _ = layer.verify(1);
    }
});
