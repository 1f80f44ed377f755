//! A driver for device tests: the guest's side of the queues, and a [`Rig`] in which a device runs
//! with plain RAM, an event loop and no KVM.

use std::sync::{Arc, Mutex, PoisonError};

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::testing::CountingInterrupt;
use super::{Activation, ActiveQueue, DeviceError, GuestRam, Lifecycle, SavedQueue, VirtioDevice};
use crate::event_loop::{EventHandler, EventLoop, Registrar};

/// `VIRTQ_DESC_F_NEXT`.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub const INDIRECT: u16 = 4;

/// Bytes of RAM that one queue's rings take at most in a [`Rig`].
const RINGS_SIZE: u64 = 0x4000;

/// The driver's side of one queue.
#[derive(Clone)]
pub struct DriverQueue {
    ram: GuestRam,
    base: u64,
    size: u16,
    next_descriptor: u16,
    avail: u16,
    used: u16,
}

impl DriverQueue {
    /// Rings for `size` descriptors at `base`.
    pub fn new(ram: &GuestRam, base: u64, size: u16) -> Self {
        Self {
            ram: ram.clone(),
            base,
            size,
            next_descriptor: 0,
            avail: 0,
            used: 0,
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The device's side, as the transport would set it up.
    pub fn device_side(&self) -> Queue {
        let saved = SavedQueue {
            max_size: self.size,
            size: self.size,
            ready: true,
            event_idx: false,
            next_avail: 0,
            next_used: 0,
            desc_table: self.base,
            avail_ring: self.avail_ring(),
            used_ring: self.used_ring(),
        };
        Queue::try_from(saved).expect("a sound queue")
    }

    /// Writes one descriptor.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = self.base + 16 * u64::from(index % self.size);
        self.put(at, &bytes);
    }

    /// Makes the chain at `head` available.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.put(self.avail_ring() + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(self.avail);
    }

    /// Writes the available ring's index.
    pub fn set_avail_index(&self, index: u16) {
        self.put(self.avail_ring() + 2, &index.to_le_bytes());
    }

    /// Offers a chain of `(address, length, device may write)`; returns its head.
    pub fn offer(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (at, &(address, len, writable)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = at + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            self.descriptor(index, address, len, flags, self.next_descriptor);
        }
        self.make_available(head);
        head
    }

    /// The next chain that the device gave back: its head, and the bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.get(self.used_ring() + 2);
        if index == self.used {
            return None;
        }
        let at = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let head: u32 = self.get(at);
        Some((head as u16, self.get(at + 4)))
    }

    /// Where the first buffer of the chain at `head` is.
    pub fn buffer_of(&self, head: u16) -> u64 {
        self.get(self.base + 16 * u64::from(head))
    }

    /// Wants an interrupt when the device has used `index` chains (event index).
    pub fn set_used_event(&self, index: u16) {
        self.put(
            self.avail_ring() + 4 + 2 * u64::from(self.size),
            &index.to_le_bytes(),
        );
    }

    /// The request number at which the device wants a kick (event index).
    pub fn avail_event(&self) -> u16 {
        self.get(self.used_ring() + 4 + 8 * u64::from(self.size))
    }

    /// Both rings empty.
    fn clear(&self) {
        self.set_avail_index(0);
        self.put(self.used_ring() + 2, &[0; 2]);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram
            .write_slice(bytes, GuestAddress(at))
            .expect("rings in RAM");
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.ram.read_obj(GuestAddress(at)).expect("rings in RAM")
    }
}

/// A device with the transport's part of its life.
pub struct Shell<D> {
    /// The device.
    pub device: D,
    /// The first error of an event. The device is not called after it.
    pub error: Option<DeviceError>,
    kicks: Vec<EventFd>,
    life: Lifecycle,
}

/// The first token of the transport's own, for kicks.
const KICK: u32 = 0x8000_0000;

impl<D: VirtioDevice> EventHandler for Shell<D> {
    fn handle_event(&mut self, token: u32, ready: EventSet) {
        let kicked = token.checked_sub(KICK);
        if let Some(queue) = kicked {
            let _ = self.kicks[queue as usize].read();
        }
        // A broken device is left alone, as the transport does.
        if self.error.is_some() {
            return;
        }
        let result = match kicked {
            Some(queue) => self.life.notify_queue(&mut self.device, queue as u16),
            None => self.life.handle_event(&mut self.device, token, ready),
        };
        self.error = result.err();
    }
}

/// A running device with its driver.
pub struct Rig<D> {
    /// Guest RAM; the rings lie at its beginning, below [`Rig::buffers`].
    pub ram: GuestRam,
    /// The driver's side of the queues.
    pub queues: Vec<DriverQueue>,
    /// Counts interrupts.
    pub interrupt: Arc<CountingInterrupt>,
    shell: Arc<Mutex<Shell<D>>>,
    events: EventLoop,
    registrar: Registrar,
    features: u64,
}

impl<D: VirtioDevice + 'static> Rig<D> {
    /// Sets up all queues with `size` descriptors at most, and activates the device with all the
    /// features it offers but `without`.
    pub fn new(device: D, ram: GuestRam, size: u16, without: u64) -> Self {
        let all = device.queue_max_sizes().len();
        Self::with_driver_queues(device, ram, size, without, all)
    }

    /// As [`Rig::new`], with only the first `count` queues.
    pub fn with_driver_queues(
        device: D,
        ram: GuestRam,
        size: u16,
        without: u64,
        count: usize,
    ) -> Self {
        let queues: Vec<_> = device
            .queue_max_sizes()
            .iter()
            .take(count)
            .zip(0..)
            .map(|(&max, at)| DriverQueue::new(&ram, at * RINGS_SIZE, max.min(size)))
            .collect();
        let sides = queues.iter().map(DriverQueue::device_side).collect();
        Self::with_queues(device, ram, queues, sides, without)
    }

    /// Brings a saved device back to life on the RAM and the driver that it had.
    pub fn restored(device: D, old: &Self, saved: &[SavedQueue]) -> Self {
        let sides = saved
            .iter()
            .map(|&queue| Queue::try_from(queue).expect("a saved queue"))
            .collect();
        let without = device.features() & !old.features;
        Self::with_queues(device, old.ram.clone(), old.queues.clone(), sides, without)
    }

    fn with_queues(
        device: D,
        ram: GuestRam,
        queues: Vec<DriverQueue>,
        sides: Vec<Queue>,
        without: u64,
    ) -> Self {
        let mut events = EventLoop::new().expect("an epoll");
        let registrar = events.reserve();
        let kicks: Vec<_> = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).expect("an eventfd"))
            .collect();
        for (kick, at) in kicks.iter().zip(KICK..) {
            registrar
                .add(kick, at, EventSet::IN)
                .expect("a new eventfd");
        }
        let features = device.features() & !without;
        let shell = Arc::new(Mutex::new(Shell {
            device,
            error: None,
            kicks,
            life: Lifecycle::new(),
        }));
        events.attach(&registrar, shell.clone());
        let rig = Self {
            ram,
            queues,
            interrupt: CountingInterrupt::shared(),
            shell,
            events,
            registrar,
            features,
        };
        rig.activate(sides);
        rig
    }

    fn activate(&self, sides: Vec<Queue>) {
        self.device(|shell| {
            let queues = sides
                .into_iter()
                .zip(&shell.kicks)
                .zip(0..)
                .map(|((queue, kick), index)| ActiveQueue {
                    index,
                    queue,
                    kick: kick.try_clone().expect("a duplicate"),
                })
                .collect();
            let activation = Activation {
                ram: self.ram.clone(),
                queues,
                features: self.features,
                interrupt: self.interrupt.clone(),
                run_state: shell.life.run_state(),
                events: self.registrar.clone(),
            };
            let Shell { device, life, .. } = shell;
            shell.error = life.activate(device, activation).err();
        });
    }

    /// Sets the queues up from the beginning, as a driver does after a reset.
    pub fn activate_again(&mut self) {
        for queue in &mut self.queues {
            *queue = DriverQueue::new(&self.ram, queue.base, queue.size);
            queue.clear();
        }
        self.activate(self.queues.iter().map(DriverQueue::device_side).collect());
    }

    /// The first address that no ring uses.
    pub fn buffers(&self) -> u64 {
        self.queues.len() as u64 * RINGS_SIZE
    }

    /// Works on the device.
    pub fn device<R>(&self, work: impl FnOnce(&mut Shell<D>) -> R) -> R {
        work(&mut self.shell.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Kicks a queue and lets everything settle.
    pub fn kick(&mut self, queue: u16) {
        self.device(|shell| shell.kicks[usize::from(queue)].write(1))
            .expect("an eventfd");
        self.run();
    }

    /// Hands out events until there are none. Panics where that never happens: a device, working
    /// or broken, must not keep the loop busy over nothing.
    pub fn run(&mut self) {
        for _ in 0..100_000 {
            if self.events.run_once(0).expect("an epoll") == 0 {
                return;
            }
        }
        panic!("the event loop never comes to rest");
    }

    /// Waits for one event (a timer, say) and for what follows from it.
    pub fn wait(&mut self) {
        self.events.run_once(5_000).expect("an epoll");
        self.run();
    }

    /// The first error of the device, if any.
    pub fn error(&self) -> Option<String> {
        self.device(|shell| shell.error.as_ref().map(ToString::to_string))
    }

    /// Pauses the device.
    pub fn pause(&self) {
        self.device(|Shell { device, life, .. }| life.pause(device))
            .expect("a pause");
    }

    /// Resumes the device.
    pub fn resume(&self) {
        self.device(|Shell { device, life, .. }| life.resume(device))
            .expect("a device that goes on");
    }

    /// Pauses and saves: the device's state and its queues.
    pub fn save(&mut self) -> (Vec<u8>, Vec<SavedQueue>) {
        self.pause();
        self.device(|shell| {
            let queues = shell.device.queues();
            let queues = queues.iter().map(|(_, queue)| SavedQueue::from(*queue));
            let queues = queues.collect();
            (shell.device.save().expect("a state"), queues)
        })
    }
}
