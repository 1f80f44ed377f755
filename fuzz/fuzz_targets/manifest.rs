//! A template's manifest.
#![no_main]

use std::path::Path;

use clone_template::Manifest;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::parse(bytes, Path::new("manifest.json")) {
        for file in manifest.content.files() {
            assert!(!file.is_empty());
        }
    }
});
