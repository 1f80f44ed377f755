//! What a network device counts, and the handle by which the rest of the process reaches it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Frames and bytes moved by the userspace path. vhost's do not pass here: the tap's own
/// statistics count them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounts {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Their bytes, without the virtio header.
    pub rx_bytes: u64,
    /// Frames for which the guest had no room.
    pub rx_dropped: u64,
    /// Frames taken from the guest.
    pub tx_frames: u64,
    /// Their bytes, without the virtio header.
    pub tx_bytes: u64,
    /// Frames of the guest that the tap refused.
    pub tx_dropped: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
}

// Counters are read for show only: no order with anything else is needed.
impl Counters {
    pub(super) fn received(&self, bytes: usize) {
        self.rx_frames.fetch_add(1, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn receive_dropped(&self) {
        self.rx_dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn transmitted(&self, bytes: usize) {
        self.tx_frames.fetch_add(1, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn transmit_dropped(&self) {
        self.tx_dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) -> NetCounts {
        NetCounts {
            rx_frames: self.rx_frames.load(Ordering::Relaxed),
            rx_bytes: self.rx_bytes.load(Ordering::Relaxed),
            rx_dropped: self.rx_dropped.load(Ordering::Relaxed),
            tx_frames: self.tx_frames.load(Ordering::Relaxed),
            tx_bytes: self.tx_bytes.load(Ordering::Relaxed),
            tx_dropped: self.tx_dropped.load(Ordering::Relaxed),
        }
    }
}

/// What the device and its handles share.
pub(super) struct Shared {
    pub(super) counters: Counters,
    /// The link as it should be; the device follows when `link_changed` tells it to.
    link_up: AtomicBool,
    link_changed: EventFd,
}

impl Shared {
    pub(super) fn new(link_up: bool) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            counters: Counters::default(),
            link_up: AtomicBool::new(link_up),
            link_changed: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        }))
    }

    pub(super) fn link_up(&self) -> bool {
        self.link_up.load(Ordering::Acquire)
    }

    pub(super) fn link_changed(&self) -> &EventFd {
        &self.link_changed
    }
}

/// Reaches a network device that its transport owns: its link and its counters. Usable from any
/// thread.
#[derive(Clone)]
pub struct NetHandle(pub(super) Arc<Shared>);

impl NetHandle {
    /// Plugs or unplugs the cable. The device follows on the event loop.
    ///
    /// # Errors
    /// Where the device cannot be woken, which would be the kernel's fault.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        self.0.link_up.store(up, Ordering::Release);
        self.0.link_changed.write(1)
    }

    /// Whether the link is, or is about to be, up.
    pub fn link_up(&self) -> bool {
        self.0.link_up()
    }

    /// What the userspace path has moved since the device was built.
    pub fn counts(&self) -> NetCounts {
        self.0.counters.read()
    }
}
