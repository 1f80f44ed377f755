//! The vsock device's queues and packets.
#![no_main]

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use clone_fuzz::{Step, drive};
use clone_vmm::devices::vsock::{Vsock, VsockResources};

libfuzzer_sys::fuzz_target!(|steps: Vec<Step>| {
    // Without a name in the file system: the kernel picks a free one.
    let address = SocketAddr::from_abstract_name(b"").expect("an address");
    let listener = UnixListener::bind_addr(&address).expect("a socket");
    let device = Vsock::new(VsockResources::new(listener), 3);
    drive(device.expect("a device"), steps);
});
