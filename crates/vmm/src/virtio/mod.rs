//! Virtio 1.x: what a device is, independent of how the guest reaches it.
//!
//! [`VirtioDevice`] is the contract between a device (`devices/…`) and its transport (virtio over
//! PCI, in `pci`). The queue format itself is the `virtio-queue` crate's. No KVM in here: a device
//! is tested and fuzzed with plain memory and a counting [`Interrupt`].
//!
//! Source: OASIS Virtual I/O Device (VIRTIO) Version 1.3.

pub mod budget;
pub mod chain;
mod device;
#[cfg(any(test, feature = "testing"))]
pub mod driver;
mod error;
mod lifecycle;
mod queue_state;
mod request_queues;
mod served_queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use chain::{DescriptorChain, Reader, Writer};
pub use device::{Activation, ActiveQueue, Interrupt, VirtioDevice};
pub use error::{DeviceError, DeviceName};
pub use lifecycle::{Lifecycle, RunState};
pub use queue_state::SavedQueue;
pub use request_queues::RequestQueues;
pub use served_queue::{RequestHandler, Served, ServedQueue, Stopped, Turn};

/// Guest RAM as devices see it.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Reads `data.len()` bytes at `offset` of a device's configuration space; past its end it is zero.
pub fn read_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).map_or(space.len(), |at| at.min(space.len()));
    let present = data.len().min(space.len() - start);
    data[..present].copy_from_slice(&space[start..start + present]);
    data[present..].fill(0);
}
