//! The descriptor chain that all virtio devices use: whatever the descriptors are, a chain that is
//! handed out is whole, in order and inside RAM.
#![no_main]

use arbitrary::Arbitrary;
use clone_vmm::virtio::driver::DriverQueue;
use clone_vmm::virtio::testing::{check_chain, ram};
use clone_vmm::virtio::{ActiveQueue, DescriptorChain, DeviceName, ServedQueue};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const RAM_BYTES: usize = 1 << 18;
const QUEUE_SIZE: u16 = 16;
/// Indirect tables are written here.
const TABLE: u64 = 0x1_0000;

/// A descriptor; with `near` its address is made to lie around the end of RAM or below.
#[derive(Arbitrary, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
    near: bool,
}

impl Descriptor {
    fn address(&self) -> u64 {
        match self.near {
            true => self.address % (RAM_BYTES as u64 + 0x100),
            false => self.address,
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Input {
    table: Vec<Descriptor>,
    indirect: Vec<Descriptor>,
    heads: Vec<u16>,
    index: Option<u16>,
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let ram = ram(RAM_BYTES);
    let mut driver = DriverQueue::new(&ram, 0, QUEUE_SIZE);
    for (index, descriptor) in (0..QUEUE_SIZE).zip(&input.table) {
        let Descriptor {
            len, flags, next, ..
        } = *descriptor;
        driver.descriptor(index, descriptor.address(), len, flags, next);
    }
    for (at, descriptor) in (TABLE..).step_by(16).take(2048).zip(&input.indirect) {
        let put = |offset: u64, bytes: &[u8]| {
            let written = ram.write_slice(bytes, GuestAddress(at + offset));
            written.expect("the table lies in RAM");
        };
        put(0, &descriptor.address().to_le_bytes());
        put(8, &descriptor.len.to_le_bytes());
        put(12, &descriptor.flags.to_le_bytes());
        put(14, &descriptor.next.to_le_bytes());
    }
    for &head in input.heads.iter().take(usize::from(QUEUE_SIZE)) {
        driver.make_available(head);
    }
    if let Some(index) = input.index {
        driver.set_avail_index(index);
    }
    let active = ActiveQueue {
        index: 0,
        queue: driver.device_side(),
        kick: EventFd::new(0).expect("an eventfd"),
    };
    let mut queue = ServedQueue::new(DeviceName::new("fuzz"), active, false);
    let mut chain = DescriptorChain::new();
    // An error breaks a device, which then stops; here the next chain is tried.
    for _ in 0..2 * QUEUE_SIZE {
        if let Ok(true) = queue.pop_into(&ram, &mut chain) {
            check_chain(&ram, &chain);
        }
    }
});
