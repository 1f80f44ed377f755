//! What the fuzz targets share: a guest's driver that does as it is told, and files from bytes.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;

use arbitrary::Arbitrary;
use clone_vmm::virtio::VirtioDevice;
use clone_vmm::virtio::driver::Rig;
use clone_vmm::virtio::testing::ram;
use vm_memory::{Bytes, GuestAddress};

/// RAM of the guests.
const RAM_BYTES: usize = 1 << 20;
/// Descriptors in a queue.
const QUEUE_SIZE: u16 = 16;
/// A run of steps that is longer finds nothing that a shorter one does not.
const MAX_STEPS: usize = 64;

/// Something that a driver may do.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Writes a descriptor of a queue. With `near` the address is made to lie in RAM.
    Descriptor {
        queue: u8,
        index: u8,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
        near: bool,
    },
    /// Puts a sound chain of up to three buffers at hand, with data, and makes it available.
    Offer {
        queue: u8,
        buffers: [(u16, u16, bool); 3],
        count: u8,
    },
    /// Makes a chain available.
    Available { queue: u8, head: u16 },
    /// Lets the available ring's index jump.
    Jump { queue: u8, index: u16 },
    /// Writes data, a request's header most often.
    Data { address: u16, bytes: [u8; 44] },
    /// Writes the device's configuration space.
    Config { offset: u8, bytes: [u8; 4] },
    /// Kicks.
    Kick { queue: u8 },
    /// Resets the device and starts it anew.
    Reset,
}

/// Runs `steps` against a device. Whatever they are, it may break, but neither panic nor keep the
/// event loop busy; and what it says of itself stays readable.
pub fn drive<D: VirtioDevice + 'static>(device: D, steps: Vec<Step>) {
    let mut rig = Rig::new(device, ram(RAM_BYTES), QUEUE_SIZE, 0);
    let queues = rig.queues.len();
    for step in steps.into_iter().take(MAX_STEPS) {
        take(&mut rig, queues, step);
    }
    for queue in 0..queues {
        rig.kick(queue as u16);
    }
    let mut config = [0; 64];
    rig.device(|shell| shell.device.read_config(0, &mut config));
}

fn take<D: VirtioDevice + 'static>(rig: &mut Rig<D>, queues: usize, step: Step) {
    let base = rig.buffers();
    let room = RAM_BYTES as u64 - base;
    let of = |queue: u8| usize::from(queue) % queues;
    match step {
        Step::Descriptor {
            queue,
            index,
            mut address,
            len,
            flags,
            next,
            near,
        } => {
            if near {
                address = base + address % room;
            }
            rig.queues[of(queue)].descriptor(index.into(), address, len, flags, next);
        }
        Step::Offer {
            queue,
            buffers,
            count,
        } => {
            let count = usize::from(count) % buffers.len() + 1;
            let chain = buffers
                .map(|(at, len, writable)| (base + u64::from(at) % room, u32::from(len), writable));
            rig.queues[of(queue)].offer(&chain[..count]);
        }
        Step::Available { queue, head } => rig.queues[of(queue)].make_available(head),
        Step::Jump { queue, index } => rig.queues[of(queue)].set_avail_index(index),
        Step::Data { address, bytes } => {
            let at = GuestAddress(base + u64::from(address) % room);
            // What lies past the end of RAM is not written.
            let _ = rig.ram.write_slice(&bytes, at);
        }
        Step::Config { offset, bytes } => {
            rig.device(|shell| shell.device.write_config(offset.into(), &bytes));
        }
        Step::Kick { queue } => rig.kick(of(queue) as u16),
        Step::Reset => {
            rig.device(|shell| {
                shell.device.reset();
                shell.error = None;
            });
            rig.activate_again();
        }
    }
}

/// A file in memory that holds `bytes`.
pub fn file(bytes: &[u8]) -> File {
    // SAFETY: the name is a C string that lives on.
    let fd = unsafe { memfd_create(c"fuzz".as_ptr(), 1) };
    assert!(fd >= 0, "no file in memory");
    // SAFETY: memfd_create has just given us this descriptor, and nobody else knows it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes).expect("room for a file");
    file
}

unsafe extern "C" {
    /// The C library's own.
    fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32;
}
