//! The MSI-X vectors that queues and configuration changes raise.
//!
//! Shared by the device (which signals) and the transport (where the guest chooses vectors)
//! without a lock, because a device signals while its transport is locked.

use std::sync::atomic::{AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::Interrupt;

/// The value for "no vector": the event raises no interrupt (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xFFFF;

pub(super) struct PciInterrupt {
    fds: Vec<EventFd>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
}

impl PciInterrupt {
    pub(super) fn new(fds: Vec<EventFd>, queues: u16) -> Self {
        let queues = (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect();
        Self {
            fds,
            config: AtomicU16::new(NO_VECTOR),
            queues,
        }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Acquire)
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queues.get(usize::from(queue));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// A vector that does not exist is answered with [`NO_VECTOR`], as the specification asks.
    fn checked(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.fds.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config.store(self.checked(vector), Ordering::Release);
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queues.get(usize::from(queue)) {
            slot.store(self.checked(vector), Ordering::Release);
        }
    }

    pub(super) fn reset(&self) {
        self.config.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queues {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    /// Checks the saved vectors of configuration changes and of each queue.
    pub(super) fn check(&self, config_vector: u16, queue_vectors: &[u16]) -> Result<(), String> {
        let known = |vector: u16| vector == NO_VECTOR || usize::from(vector) < self.fds.len();
        if !known(config_vector) || !queue_vectors.iter().all(|&vector| known(vector)) {
            return Err("a queue's interrupt vector does not exist".to_owned());
        }
        if queue_vectors.len() != self.queues.len() {
            return Err("another number of queues".to_owned());
        }
        Ok(())
    }

    /// Restores the saved vectors of configuration changes and of each queue.
    pub(super) fn restore(&self, config_vector: u16, queue_vectors: &[u16]) -> Result<(), String> {
        self.check(config_vector, queue_vectors)?;
        self.set_config_vector(config_vector);
        for (queue, &vector) in (0..).zip(queue_vectors) {
            self.set_queue_vector(queue, vector);
        }
        Ok(())
    }

    fn raise(&self, vector: u16) {
        if let Some(fd) = self.fds.get(usize::from(vector)) {
            // EAGAIN means a counter at its limit: the interrupt is pending already.
            let _ = fd.write(1);
        }
    }
}

impl Interrupt for PciInterrupt {
    fn signal_queue(&self, queue: u16) {
        self.raise(self.queue_vector(queue));
    }

    fn signal_config(&self) {
        self.raise(self.config_vector());
    }

    fn queue_eventfd(&self, queue: u16) -> Option<EventFd> {
        let fd = self.fds.get(usize::from(self.queue_vector(queue)))?;
        match fd.try_clone() {
            Ok(fd) => Some(fd),
            Err(error) => {
                tracing::warn!(queue, %error, "cannot share the interrupt of a queue");
                None
            }
        }
    }
}
