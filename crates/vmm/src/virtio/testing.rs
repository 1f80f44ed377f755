//! What device tests and fuzz targets share: plain RAM and an interrupt that only counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{GuestRam, Interrupt};

/// RAM of `size` bytes at address 0.
pub fn ram(size: usize) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), size)]).expect("a small anonymous mapping")
}

/// Counts interrupts instead of raising them.
#[derive(Default)]
pub struct CountingInterrupt {
    queues: AtomicUsize,
    configs: AtomicUsize,
}

impl CountingInterrupt {
    /// A shared counter, ready to be lent to a device.
    pub fn shared() -> Arc<Self> {
        Arc::default()
    }

    /// Queue interrupts so far.
    pub fn queue_count(&self) -> usize {
        self.queues.load(Ordering::SeqCst)
    }

    /// Configuration interrupts so far.
    pub fn config_count(&self) -> usize {
        self.configs.load(Ordering::SeqCst)
    }
}

impl Interrupt for CountingInterrupt {
    fn signal_queue(&self, _queue: u16) {
        self.queues.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {
        self.configs.fetch_add(1, Ordering::SeqCst);
    }

    fn queue_eventfd(&self, _queue: u16) -> Option<EventFd> {
        None
    }
}
