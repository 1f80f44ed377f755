//! Virtio 1.x: what a device is, independent of how the guest reaches it.
//!
//! [`VirtioDevice`] is the contract between a device (`devices/…`) and its transport (virtio over
//! PCI, in `pci`). The queue format itself is the `virtio-queue` crate's. No KVM in here: a device
//! is tested and fuzzed with plain memory and a counting [`Interrupt`].
//!
//! Source: OASIS Virtual I/O Device (VIRTIO) Version 1.3.

mod device;
mod queue_state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use device::{Activation, ActiveQueue, DeviceError, Interrupt, VirtioDevice};
pub use queue_state::SavedQueue;

/// Guest RAM as devices see it.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
