//! The counters of a network device, and the handle by which the rest of the process reaches the
//! device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Frames and bytes that the userspace path has moved. Those of vhost are counted by the tap's own
/// statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounts {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// The bytes of these frames, without the virtio header.
    pub rx_bytes: u64,
    /// Frames for which the guest had no room.
    pub rx_dropped: u64,
    /// Frames taken from the guest.
    pub tx_frames: u64,
    /// The bytes of these frames, without the virtio header.
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

// The counters need no order with other memory accesses, because they are only shown.
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

/// The state that the device and its handles share.
pub(super) struct Shared {
    pub(super) counters: Counters,
    /// Whether the link is to be up. The device follows when `link_changed` is written.
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

    /// Sets the link of an idle device, whose driver need not be told.
    pub(super) fn restore_link(&self, up: bool) {
        self.link_up.store(up, Ordering::Release);
    }

    pub(super) fn link_changed(&self) -> &EventFd {
        &self.link_changed
    }
}

/// A handle of a network device that its transport owns, for the link and the counters. It can be
/// used on any thread.
#[derive(Clone)]
pub struct NetHandle(pub(super) Arc<Shared>);

impl NetHandle {
    /// Plugs or unplugs the cable. The device follows on the event loop.
    ///
    /// # Errors
    /// Where the device's eventfd cannot be written.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        self.0.link_up.store(up, Ordering::Release);
        self.0.link_changed.write(1)
    }

    /// Whether the link is, or is about to be, up.
    pub fn link_up(&self) -> bool {
        self.0.link_up()
    }

    /// The counters of the userspace path since the device was built.
    pub fn counts(&self) -> NetCounts {
        self.0.counters.read()
    }
}
