//! Helpers of tests and fuzz targets of the network device: a port that is a pair of sockets, and
//! the driver's side of a queue.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::tap::Port;
use crate::virtio::{ActiveQueue, GuestRam};

/// The descriptor flag that another follows.
pub const NEXT: u16 = 1;
/// The descriptor flag that the device writes.
pub const WRITE: u16 = 2;
/// The descriptor flag of a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A port whose frames come from and go to a socket.
pub struct SocketPort {
    file: File,
    settings: Arc<PortSettings>,
}

/// The settings that the device has made on a [`SocketPort`].
pub struct PortSettings {
    offloads: AtomicU32,
    attached: AtomicBool,
    refuse_offloads: Mutex<Option<u32>>,
}

impl PortSettings {
    /// The offloads last set.
    pub fn offloads(&self) -> u32 {
        self.offloads.load(Ordering::SeqCst)
    }

    /// Whether frames are steered to the port.
    pub fn attached(&self) -> bool {
        self.attached.load(Ordering::SeqCst)
    }

    /// Makes the port refuse these offloads from now on.
    pub fn refuse_offloads(&self, flags: u32) {
        *self
            .refuse_offloads
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(flags);
    }
}

impl SocketPort {
    /// Makes a port. Returns it with its far end and its settings.
    ///
    /// # Errors
    /// The kernel's error where it makes no sockets.
    pub fn pair() -> io::Result<(Self, File, Arc<PortSettings>)> {
        let (near, far) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )?;
        let settings = Arc::new(PortSettings {
            offloads: AtomicU32::new(0),
            attached: AtomicBool::new(true),
            refuse_offloads: Mutex::new(None),
        });
        let file = |fd: OwnedFd| File::from(fd);
        let port = Self {
            file: file(near),
            settings: Arc::clone(&settings),
        };
        Ok((port, file(far), settings))
    }
}

impl Port for SocketPort {
    fn file(&self) -> &File {
        &self.file
    }

    fn set_offloads(&self, flags: u32) -> io::Result<()> {
        let refused = self
            .settings
            .refuse_offloads
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if refused.is_some_and(|refused| refused & flags != 0) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.settings.offloads.store(flags, Ordering::SeqCst);
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.settings.attached.store(attached, Ordering::SeqCst);
        Ok(())
    }
}

/// The driver's side of one queue. Its rings take the first 32 KiB after `base`.
pub struct DriverQueue {
    ram: GuestRam,
    base: u64,
    size: u16,
    event_idx: bool,
    /// The next descriptor to fill; they are taken in turn.
    next_descriptor: u16,
    avail: u16,
    seen_used: u16,
}

impl DriverQueue {
    /// A queue of `size` entries with its rings at `base` (a multiple of 16).
    pub fn new(ram: &GuestRam, base: u64, size: u16, event_idx: bool) -> Self {
        Self {
            ram: ram.clone(),
            base,
            size,
            event_idx,
            next_descriptor: 0,
            avail: 0,
            seen_used: 0,
        }
    }

    /// The address of the available ring.
    pub fn avail_ring(&self) -> u64 {
        self.base + 0x4000
    }

    /// The address of the used ring.
    pub fn used_ring(&self) -> u64 {
        self.base + 0x5000
    }

    /// The queue as a transport hands it to the device, and a copy of its kick.
    ///
    /// # Panics
    /// Panics where the kernel makes no eventfd.
    pub fn activate(&self, index: u16) -> (ActiveQueue, EventFd) {
        let mut queue = Queue::new(self.size).expect("a power of two");
        queue.set_desc_table_address(Some(self.base as u32), Some((self.base >> 32) as u32));
        queue.set_avail_ring_address(Some(self.avail_ring() as u32), None);
        queue.set_used_ring_address(Some(self.used_ring() as u32), None);
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let copy = kick.try_clone().expect("a copy of an eventfd");
        (ActiveQueue { index, queue, kick }, copy)
    }

    /// Writes the descriptor of number `number`.
    pub fn write_descriptor(&self, number: u16, address: u64, len: u32, flags: u16, next: u16) {
        let descriptor = Descriptor::new(address, len, flags, next);
        let at = GuestAddress(self.base + 16 * u64::from(number));
        self.ram.write_obj(descriptor, at).expect("in RAM");
    }

    /// Makes a chain of buffers (address, length, flags but for "next") available.
    pub fn add(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor % self.size;
        for (position, &(address, len, flags)) in buffers.iter().enumerate() {
            let number = self.next_descriptor % self.size;
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
            let next = self.next_descriptor % self.size;
            let last = position + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            self.write_descriptor(number, address, len, flags, next);
        }
        self.offer(head);
        head
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail % self.size);
        self.ram
            .write_obj(head, GuestAddress(slot))
            .expect("in RAM");
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(self.avail);
    }

    /// Sets the available ring's index to any value.
    pub fn set_avail_index(&self, index: u16) {
        self.ram
            .write_obj(index, GuestAddress(self.avail_ring() + 2))
            .expect("in RAM");
    }

    /// Asks for an interrupt once the used index passes `index` (with event indexes).
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail_ring() + 4 + 2 * u64::from(self.size);
        self.ram.write_obj(index, GuestAddress(at)).expect("in RAM");
    }

    /// Chains that came back since the last call: head and bytes written.
    pub fn take_used(&mut self) -> Vec<(u16, u32)> {
        let index: u16 = self
            .ram
            .read_obj(GuestAddress(self.used_ring() + 2))
            .expect("in RAM");
        let mut taken = Vec::new();
        while self.seen_used != index {
            let slot = self.used_ring() + 4 + 8 * u64::from(self.seen_used % self.size);
            let element: [u32; 2] = self.ram.read_obj(GuestAddress(slot)).expect("in RAM");
            taken.push((element[0] as u16, element[1]));
            self.seen_used = self.seen_used.wrapping_add(1);
        }
        taken
    }
}
