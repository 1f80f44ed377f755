//! A virtio device's PCI function, as a guest's CPU reaches it: configuration space, the BAR with
//! virtio's registers and the MSI-X table, and the queues in RAM.
#![no_main]

use std::io;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use clone_vmm::devices::rng::Rng;
use clone_vmm::event_loop::EventLoop;
use clone_vmm::irq::{Gsi, IrqRoutes, MsiMessage};
use clone_vmm::pci::PciDevice;
use clone_vmm::pci::virtio_pci::VirtioPci;
use clone_vmm::virtio::testing::ram;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const RAM_BYTES: usize = 256 << 10;
const BAR: u32 = 0x8000_0000;
const MAX_STEPS: usize = 128;

/// Takes everything and does nothing, but keeps count of doorbells.
#[derive(Default)]
struct Nowhere {
    gsi: Mutex<u32>,
    doorbells: Mutex<Vec<u64>>,
}

impl IrqRoutes for Nowhere {
    fn allocate(&self) -> io::Result<Gsi> {
        let mut next = self.gsi.lock().expect("no panic before");
        *next += 1;
        Ok(Gsi(*next))
    }
    fn set_route(&self, _gsi: Gsi, _message: MsiMessage) -> io::Result<()> {
        Ok(())
    }
    fn connect(&self, _fd: &EventFd, _gsi: Gsi) -> io::Result<()> {
        Ok(())
    }
    fn disconnect(&self, _fd: &EventFd, _gsi: Gsi) -> io::Result<()> {
        Ok(())
    }
    fn signal(&self, _message: MsiMessage) -> io::Result<()> {
        Ok(())
    }
    fn register_ioeventfd(&self, address: u64, _fd: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().expect("no panic before");
        // KVM refuses a second doorbell at one place.
        assert!(
            !doorbells.contains(&address),
            "two doorbells at {address:#x}"
        );
        doorbells.push(address);
        Ok(())
    }
    fn unregister_ioeventfd(&self, address: u64, _fd: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().expect("no panic before");
        let before = doorbells.len();
        doorbells.retain(|&other| other != address);
        assert!(doorbells.len() < before, "no doorbell at {address:#x}");
        Ok(())
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    ConfigRead {
        offset: u16,
        len: u8,
    },
    ConfigWrite {
        offset: u16,
        bytes: [u8; 4],
        len: u8,
    },
    BarRead {
        offset: u32,
        len: u8,
    },
    BarWrite {
        offset: u32,
        bytes: [u8; 8],
        len: u8,
    },
    Ram {
        address: u32,
        bytes: [u8; 16],
    },
    Events,
}

/// The widths that a CPU's accesses have.
fn width(len: u8) -> usize {
    1 << (len % 4)
}

libfuzzer_sys::fuzz_target!(|steps: Vec<Step>| {
    let ram = ram(RAM_BYTES);
    let mut events = EventLoop::new().expect("an epoll");
    let device = Rng::new(None).expect("a device");
    let registrar = events.reserve();
    let function = VirtioPci::new(
        Arc::new(Mutex::new(device)),
        BAR,
        Arc::new(Nowhere::default()),
        ram.clone(),
        registrar.clone(),
    );
    let function = Arc::new(Mutex::new(function.expect("a function")));
    events.attach(&registrar, function.clone());
    for step in steps.into_iter().take(MAX_STEPS) {
        let mut function = function.lock().expect("no panic before");
        let mut data = [0; 8];
        let bar = |offset: u32, len: usize| {
            u64::from(offset % VirtioPci::BAR_SIZE) / 8 * 8 + 8 - len as u64
        };
        match step {
            Step::ConfigRead { offset, len } => {
                let len = width(len).min(4);
                function.config_read(offset % (4096 - 4), &mut data[..len]);
            }
            Step::ConfigWrite { offset, bytes, len } => {
                let len = width(len).min(4);
                function.config_write(offset % (4096 - 4), &bytes[..len]);
            }
            Step::BarRead { offset, len } => {
                let len = width(len);
                function.bar_read(0, bar(offset, len), &mut data[..len]);
            }
            Step::BarWrite { offset, bytes, len } => {
                let len = width(len);
                function.bar_write(0, bar(offset, len), &bytes[..len]);
            }
            Step::Ram { address, bytes } => {
                let at = GuestAddress(u64::from(address) % RAM_BYTES as u64);
                // What lies past the end of RAM is not written.
                let _ = ram.write_slice(&bytes, at);
            }
            Step::Events => {
                drop(function);
                while events.run_once(0).expect("an epoll") > 0 {}
            }
        }
    }
});
