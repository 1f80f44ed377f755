//! vhost-net: the host kernel serves a queue pair itself, from the guest's rings to the tap.
//!
//! The kernel reads and writes guest RAM through this process's page tables, so its writes are seen
//! there like any others. It is stopped by removing its tap, after which the ring positions can be
//! read.
//!
//! Source: `linux/vhost.h`, `drivers/vhost/{vhost,net}.c` of the Linux kernel.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::net::VhostNet as _;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{DEVICE, features};
use crate::virtio::{DeviceError, GuestRam, Interrupt, ServedQueue};

/// The numbers that vhost gives to a pair's rings.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// One vhost-net instance, which serves one queue pair.
pub(super) struct VhostNet {
    file: File,
    /// The RAM that was shared with the kernel. It is empty before the first start.
    ram: Arc<GuestRam>,
    /// The eventfd that the kernel writes when it finds a ring broken.
    errors: EventFd,
    /// The eventfd that receives the interrupts of a queue without a vector.
    nowhere: EventFd,
}

/// The resources that running the pair needs besides its rings.
pub(super) struct Start<'a> {
    /// Guest RAM.
    pub(super) ram: &'a GuestRam,
    /// The features agreed on.
    pub(super) features: u64,
    /// Provides the eventfds for interrupts.
    pub(super) interrupt: &'a dyn Interrupt,
    /// The tap.
    pub(super) tap: &'a File,
}

impl VhostNet {
    /// Makes an instance of an open `/dev/vhost-net`. This process becomes the owner, so it must be
    /// the one that has mapped guest RAM.
    pub(super) fn new(file: File) -> Result<Self, DeviceError> {
        let eventfd = || {
            EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
                .map_err(DEVICE.host_error("make an eventfd for vhost"))
        };
        let vhost = Self {
            file,
            ram: Arc::new(GuestRam::new()),
            errors: eventfd()?,
            nowhere: eventfd()?,
        };
        vhost.set_owner().map_err(refused("own vhost-net"))?;
        let offered = vhost
            .get_features()
            .map_err(refused("read the features of vhost-net"))?;
        if offered & features::VHOST != features::VHOST {
            return Err(DEVICE.host_error("use vhost-net")(io::Error::other(
                format!(
                    "the kernel's lacks the features {:#x}",
                    features::VHOST & !offered
                ),
            )));
        }
        Ok(vhost)
    }

    /// Readable when the kernel found one of the rings broken.
    pub(super) fn errors(&self) -> &EventFd {
        &self.errors
    }

    /// Starts the kernel on the pair, from the queues' present positions.
    pub(super) fn start(
        &mut self,
        rx: &ServedQueue,
        tx: &ServedQueue,
        with: &Start<'_>,
    ) -> Result<(), DeviceError> {
        // An error of earlier rings is cleared. There is usually none.
        let _ = self.errors.read();
        self.set_features(with.features & features::VHOST)
            .map_err(refused("set the features of vhost-net"))?;
        self.share_ram(with.ram)?;
        for (ring, queue) in [(RECEIVE, rx), (TRANSMIT, tx)] {
            self.set_up_ring(ring, queue, with.interrupt)
                .map_err(refused("hand a ring to vhost-net"))?;
        }
        for ring in [RECEIVE, TRANSMIT] {
            if let Err(error) = self.set_backend(ring, Some(with.tap)) {
                // Both rings of a pair run, or none.
                self.take_tap_away()?;
                return Err(refused("give the tap to vhost-net")(error));
            }
        }
        Ok(())
    }

    /// Stops the kernel, waits for the frames that it is moving, and updates the queues' positions.
    pub(super) fn stop(
        &mut self,
        ram: &GuestRam,
        rx: &mut ServedQueue,
        tx: &mut ServedQueue,
    ) -> Result<(), DeviceError> {
        self.take_tap_away()?;
        for (ring, queue) in [(RECEIVE, rx), (TRANSMIT, tx)] {
            let base = self
                .get_vring_base(ring)
                .map_err(refused("read a ring's position from vhost-net"))?;
            // vhost starts from the used index in RAM, which is up to date when vhost stops.
            let used = queue
                .queue()
                .used_idx(ram, Ordering::Acquire)
                .map_err(DEVICE.queue_error(queue.index()))?;
            // The upper half is used by packed rings only.
            queue.set_position(base as u16, used.0);
        }
        Ok(())
    }

    fn take_tap_away(&self) -> Result<(), DeviceError> {
        for ring in [RECEIVE, TRANSMIT] {
            self.set_backend(ring, None)
                .map_err(refused("take the tap from vhost-net"))?;
        }
        Ok(())
    }

    fn share_ram(&mut self, ram: &GuestRam) -> Result<(), DeviceError> {
        self.ram = Arc::new(ram.clone());
        let regions: Vec<_> = ram
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                ..Default::default()
            })
            .collect();
        self.set_mem_table(&regions)
            .map(drop)
            .map_err(refused("share RAM with vhost-net"))
    }

    fn set_up_ring(
        &self,
        ring: usize,
        served: &ServedQueue,
        interrupt: &dyn Interrupt,
    ) -> vhost::Result<()> {
        let queue = served.queue();
        self.set_vring_num(ring, queue.size())?;
        self.set_vring_base(ring, queue.next_avail())?;
        self.set_vring_addr(ring, &ring_addresses(queue))?;
        let call = interrupt.queue_eventfd(served.index());
        self.set_vring_call(ring, call.as_ref().unwrap_or(&self.nowhere))?;
        self.set_vring_err(ring, &self.errors)?;
        self.set_vring_kick(ring, served.kick())
    }
}

impl VhostKernBackend for VhostNet {
    type AS = Arc<GuestRam>;

    fn mem(&self) -> &Self::AS {
        &self.ram
    }

    /// Each ring must lie in one region, because the kernel gets one host address for it. (The
    /// default implementation also refuses a ring that ends where a region ends.)
    fn is_valid(&self, ring: &VringConfigData) -> bool {
        let size = usize::from(ring.queue_size);
        [
            (ring.desc_table_addr, 16 * size),
            (ring.avail_ring_addr, 6 + 2 * size),
            (ring.used_ring_addr, 6 + 8 * size),
        ]
        .into_iter()
        .all(|(address, len)| self.ram.get_slice(GuestAddress(address), len).is_ok())
    }
}

impl vhost::net::VhostNet for VhostNet {
    fn set_backend(&self, ring: usize, tap: Option<&File>) -> vhost::Result<()> {
        let request = vhost_vring_file {
            index: ring as u32,
            fd: tap.map_or(-1, AsRawFd::as_raw_fd),
        };
        // SAFETY: VHOST_NET_SET_BACKEND reads one vhost_vring_file, which lives through the call.
        if unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &request) } < 0 {
            return Err(vhost::Error::IoctlError(io::Error::last_os_error()));
        }
        Ok(())
    }
}

impl AsRawFd for VhostNet {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn ring_addresses(queue: &Queue) -> VringConfigData {
    VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    }
}

fn refused(action: &'static str) -> impl FnOnce(vhost::Error) -> DeviceError {
    move |error| {
        let source = match error {
            vhost::Error::IoctlError(source) | vhost::Error::IOError(source) => source,
            other => io::Error::other(other),
        };
        DEVICE.host_error(action)(source)
    }
}
