//! The network device's queues in user space: receive, transmit, control.
#![no_main]

use clone_fuzz::{Step, drive};
use clone_vmm::devices::net::testing::SocketPort;
use clone_vmm::devices::net::{Net, NetConfig, NetResources, Port};
use clone_vmm::rate_limit::RateLimits;

libfuzzer_sys::fuzz_target!(|steps: Vec<Step>| {
    let (port, _far, _settings) = SocketPort::pair().expect("sockets");
    let config = NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1400),
        queue_pairs: 1,
        limits: RateLimits::default(),
    };
    let ports: Vec<Box<dyn Port>> = vec![Box::new(port)];
    let vhost = Vec::new();
    let device = Net::new(NetResources { ports, vhost }, config);
    drive(device.expect("a device"), steps);
});
