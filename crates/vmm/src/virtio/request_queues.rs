//! The resources of an active device whose queues all carry requests, and which waits for descriptors
//! of its own in the event loop. What a request means, and when one is taken, is left to the device.

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

use super::{Activation, DeviceError, DeviceName, GuestRam, Interrupt, ServedQueue};
use crate::event_loop::Registrar;

/// The queues of an active device, and what serving them needs.
pub struct RequestQueues {
    /// Guest RAM.
    pub ram: GuestRam,
    /// The queues, in order. A queue's place here is its *slot*.
    pub queues: Vec<ServedQueue>,
    /// The device's registrations in the event loop.
    pub events: Registrar,
    device: DeviceName,
    interrupt: Arc<dyn Interrupt>,
}

impl RequestQueues {
    /// Takes over the resources of an activation.
    pub fn new(device: DeviceName, activation: Activation) -> Self {
        let event_idx = activation.features >> VIRTIO_RING_F_EVENT_IDX & 1 != 0;
        let queues = activation.queues.into_iter();
        Self {
            ram: activation.ram,
            queues: queues
                .map(|queue| ServedQueue::new(device, queue, event_idx))
                .collect(),
            events: activation.events,
            device,
            interrupt: activation.interrupt,
        }
    }

    /// The slot of the queue with this index.
    pub fn slot_of(&self, index: u16) -> Option<usize> {
        self.queues.iter().position(|queue| queue.index() == index)
    }

    /// Waits for input of these descriptors, by their tokens. `action` says for what, in an error.
    ///
    /// # Errors
    /// [`DeviceError::Host`] where the event loop cannot wait for one.
    pub fn register(
        &self,
        descriptors: &[(u32, RawFd)],
        action: &'static str,
    ) -> Result<(), DeviceError> {
        descriptors.iter().try_for_each(|(token, fd)| {
            let added = self.events.add(fd, *token, EventSet::IN);
            added.map_err(self.device.host_error(action))
        })
    }

    /// No longer waits for these descriptors.
    pub fn unregister(&self, descriptors: &[(u32, RawFd)]) {
        for (_, fd) in descriptors {
            // They are missing where registering them failed, and during a pause.
            let _ = self.events.remove(fd);
        }
    }

    /// Interrupts the guest for queues with new used buffers, where it wants that.
    ///
    /// # Errors
    /// As [`ServedQueue::signal`].
    pub fn signal(&mut self) -> Result<(), DeviceError> {
        let (ram, interrupt) = (&self.ram, &*self.interrupt);
        let mut queues = self.queues.iter_mut();
        queues.try_for_each(|queue| queue.signal(ram, interrupt))
    }

    /// Makes the event loop come back to every queue.
    ///
    /// # Errors
    /// As [`ServedQueue::requeue`].
    pub fn requeue_all(&self) -> Result<(), DeviceError> {
        self.queues.iter().try_for_each(ServedQueue::requeue)
    }

    /// The queues by their indexes, for saving them.
    pub fn indexed(&self) -> Vec<(u16, &Queue)> {
        self.queues.iter().map(ServedQueue::indexed).collect()
    }
}
