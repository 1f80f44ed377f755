//! What device tests and fuzz targets share: plain RAM and an interrupt that only counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{GuestAddress, GuestMemory, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{MAX_DESCRIPTORS, Segment};
use super::{DescriptorChain, GuestRam, Interrupt};

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

/// Checks what [`DescriptorChain`] promises of every chain that it hands out, and reaches all of
/// its bytes.
///
/// # Panics
/// Where a promise is broken.
pub fn check_chain(ram: &GuestRam, chain: &DescriptorChain<'_>) {
    let (mut reader, mut writer) = (chain.reader(), chain.writer());
    assert_eq!(reader.remaining(), chain.readable_len());
    assert_eq!(writer.remaining(), chain.writable_len());
    let total = chain.readable_len() + chain.writable_len();
    assert!(u32::try_from(total).is_ok(), "{total} bytes");
    let segments: Vec<_> = reader.segments().chain(writer.segments()).collect();
    assert!(segments.len() <= MAX_DESCRIPTORS);
    let sum: usize = segments.iter().map(|segment| segment.slice.len()).sum();
    assert_eq!(sum, total);
    for Segment { address, slice } in segments {
        assert!(!slice.is_empty());
        assert!(ram.check_range(address, slice.len(), Permissions::ReadWrite));
    }
    let mut bytes = vec![0; reader.remaining().min(64)];
    reader
        .read_exact(&mut bytes)
        .expect("as many bytes as it has");
    bytes.resize(writer.remaining().min(64), 0xEE);
    writer.write_all(&bytes).expect("as much room as it has");
}
