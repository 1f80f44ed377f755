//! Errors of devices, which always name the device, and the constructors that all devices share.

use std::fmt;
use std::io;

/// The short name of a kind of device, as in "block". Errors, logs and saved states carry it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceName(&'static str);

/// What went wrong in a device. The guest's own mistakes are not errors of the VMM: they break the
/// device ([`VirtioDevice::notify_queue`](super::VirtioDevice::notify_queue)) and nothing else.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The rings of a queue are laid out wrongly, or lie outside RAM.
    #[error("{device} device, queue {queue}: {source}")]
    Queue {
        /// The device's name.
        device: DeviceName,
        /// The queue's index.
        queue: u16,
        /// The error of the queue code.
        source: virtio_queue::Error,
    },
    /// The host refused something that the device needs.
    #[error("{device} device: cannot {action}: {source}")]
    Host {
        /// The device's name.
        device: DeviceName,
        /// What was tried, as in "read the tap".
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// A saved state does not fit this device.
    #[error("{device} device: saved state refused: {reason}")]
    State {
        /// The device's name.
        device: DeviceName,
        /// Why the state does not fit.
        reason: String,
    },
    /// The driver did what the specification forbids.
    #[error("{device} device: the driver broke the specification: {reason}")]
    Driver {
        /// The device's name.
        device: DeviceName,
        /// What the driver did.
        reason: String,
    },
}

impl DeviceName {
    /// The name of a kind of device.
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// The name as text.
    pub const fn as_str(self) -> &'static str {
        self.0
    }

    /// For `map_err`: the host refused `action`, as in "read the tap".
    pub fn host_error(self, action: &'static str) -> impl Fn(io::Error) -> DeviceError + Copy {
        move |source| DeviceError::Host {
            device: self,
            action,
            source,
        }
    }

    /// For `map_err`: the rings of `queue` cannot be used.
    pub fn queue_error(self, queue: u16) -> impl Fn(virtio_queue::Error) -> DeviceError + Copy {
        move |source| DeviceError::Queue {
            device: self,
            queue,
            source,
        }
    }

    /// The driver did what the specification forbids.
    pub fn driver_error(self, reason: impl fmt::Display) -> DeviceError {
        DeviceError::Driver {
            device: self,
            reason: reason.to_string(),
        }
    }

    /// A saved state does not fit the device.
    pub fn state_error(self, reason: impl fmt::Display) -> DeviceError {
        DeviceError::State {
            device: self,
            reason: reason.to_string(),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}
