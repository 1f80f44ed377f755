//! Requests to a VM's control socket.
#![no_main]

use clone_vm_process::control::http::{MAX_BODY, Parsed, parse};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Parsed::Complete(request, len) = parse(bytes) {
        assert!(request.body.len() <= MAX_BODY);
        assert!(len <= bytes.len() && len > request.body.len());
    }
});
