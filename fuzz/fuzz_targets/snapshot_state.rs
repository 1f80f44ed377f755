//! A machine's saved state: what decodes can be encoded, and decodes to the same bytes again.
#![no_main]

use clone_vmm::snapshot::{decode, encode};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(state) = decode(bytes) {
        let again = encode(&state).expect("plain data");
        assert!(decode(&again).is_ok());
    }
});
