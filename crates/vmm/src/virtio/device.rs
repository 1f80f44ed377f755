//! The contract between a virtio device and its transport.

use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceError, DeviceName, GuestRam, RunState};
use crate::event_loop::Registrar;

/// The way in which a device interrupts the guest. The transport implements it, and tests use a
/// counter.
pub trait Interrupt: Send + Sync {
    /// Used buffers were added to `queue`. The caller has already asked
    /// `Queue::needs_notification`.
    fn signal_queue(&self, queue: u16);

    /// The device's configuration space changed.
    fn signal_config(&self);

    /// An eventfd that interrupts for `queue` when written, for data paths in the kernel (vhost).
    /// `None` where the guest gave the queue no vector.
    fn queue_eventfd(&self, queue: u16) -> Option<EventFd>;
}

/// A queue that the driver has set up, as handed to the device.
pub struct ActiveQueue {
    /// The queue's index in the device.
    pub index: u16,
    /// The rings, which lie in RAM.
    pub queue: Queue,
    /// Written by KVM when the driver kicks the queue. The transport waits on it and calls
    /// [`VirtioDevice::notify_queue`], unless [`VirtioDevice::in_kernel`] is true for the queue.
    pub kick: EventFd,
}

/// The resources that a device gets when its driver is ready (`DRIVER_OK`), until it is reset.
pub struct Activation {
    /// Guest RAM.
    pub ram: GuestRam,
    /// The queues that the driver has enabled, in order.
    pub queues: Vec<ActiveQueue>,
    /// The features both sides agreed on.
    pub features: u64,
    /// The device's way to interrupt the guest.
    pub interrupt: Arc<dyn Interrupt>,
    /// Whether the device is running, for calls that reach it past the transport.
    pub run_state: RunState,
    /// Registers the device's own file descriptors. The device chooses tokens below `0x8000_0000`;
    /// their events come to [`VirtioDevice::handle_event`].
    pub events: Registrar,
}

/// A virtio device: its features, configuration space, queues and life cycle.
///
/// The transport owns the device and calls it under a lock: from vCPU threads for configuration
/// and activation, from the event loop for everything else. No call may block for long.
///
/// Life: built → ([`restore`] →) [`activate`] → (notify, events) … → [`pause`] ⇄ [`resume`] … →
/// [`reset`] (back to built) or dropped. A saved state is always taken over by [`restore`], by a
/// device that was just built and by one that was reset alike.
///
/// [`restore`]: VirtioDevice::restore
/// [`activate`]: VirtioDevice::activate
/// [`pause`]: VirtioDevice::pause
/// [`resume`]: VirtioDevice::resume
/// [`reset`]: VirtioDevice::reset
pub trait VirtioDevice: Send {
    /// The name that errors and logs give the device.
    fn name(&self) -> DeviceName;

    /// The device id of the specification (section 5), as in 2 for block.
    fn device_type(&self) -> u32;

    /// The features offered, which only [`VirtioDevice::restore`] changes. The transport adds
    /// `VIRTIO_F_VERSION_1` and acknowledges no others.
    fn features(&self) -> u64;

    /// The largest size of each queue (a power of two). The length of the list is the number of
    /// queues.
    fn queue_max_sizes(&self) -> Vec<u16>;

    /// Reads the device's configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space. By default it is not writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Whether `queue` is served by the kernel (vhost), so that the transport must leave its kicks
    /// alone. Asked after [`VirtioDevice::activate`] returned.
    fn in_kernel(&self, _queue: u16) -> bool {
        false
    }

    /// The driver is ready, or the device is restored: it takes the queues and starts.
    ///
    /// At restore the device has taken over its state, and the queues carry their saved positions; it
    /// must look at each queue for work that was left (a kick may have been lost).
    /// An error marks the device as broken (`DEVICE_NEEDS_RESET`).
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// The driver kicked `queue`. An error means the driver broke the rules or the host failed for
    /// good: the transport marks the device as broken and stops calling it until a reset.
    fn notify_queue(&mut self, queue: u16) -> Result<(), DeviceError>;

    /// One of the device's own file descriptors is ready; errors as in
    /// [`VirtioDevice::notify_queue`]. Events that come while the device is paused are kept by the
    /// transport and follow after [`VirtioDevice::resume`].
    fn handle_event(&mut self, token: u32, ready: EventSet) -> Result<(), DeviceError>;

    /// Stops all work: after it returns no request is in flight, RAM and queues are at rest, and
    /// [`VirtioDevice::queues`] has their true positions. Host resources stay open. Descriptors
    /// that the loop watches by level must be removed from it, since nobody takes their events.
    fn pause(&mut self) -> Result<(), DeviceError>;

    /// Resumes work after a pause: watches its descriptors again, and looks at every queue for
    /// work that came meanwhile.
    fn resume(&mut self) -> Result<(), DeviceError>;

    /// Forgets the driver: drops the resources of [`VirtioDevice::activate`] after requests in
    /// flight are over. The device can be activated again. Host resources stay open.
    fn reset(&mut self);

    /// The queues of the activation with their present positions, or none while the device is idle.
    /// The positions are exact only while the device is paused.
    fn queues(&self) -> Vec<(u16, &Queue)>;

    /// The device's own state beyond its queues, as an encoded versioned value of its `state.rs`.
    /// Called while paused or before activation.
    fn save(&self) -> Result<Vec<u8>, DeviceError>;

    /// Checks that this device, once idle, can take over `state`, which a device of its kind has
    /// saved, perhaps on another host. Returns the features that it will offer then. Nothing is
    /// changed.
    ///
    /// # Errors
    /// [`DeviceError::State`] where it cannot.
    fn check_state(&self, state: &[u8]) -> Result<u64, DeviceError>;

    /// Takes over `state` in place, while idle: new, or reset. What the guest knows of the device
    /// comes from the state; what the host decides (resources, limits, hardware addresses) stays.
    ///
    /// # Errors
    /// Those of [`VirtioDevice::check_state`], before anything is changed, and
    /// [`DeviceError::Host`].
    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError>;
}
