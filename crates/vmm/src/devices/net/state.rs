//! The saved state of a network device.

use serde::{Deserialize, Serialize};

use super::{DEVICE, features};
use crate::rate_limit::RateLimits;
use crate::state_codec::VersionedState;
use crate::virtio::{DeviceError, DeviceName};

/// The most queue pairs that a device may have, which is one per vCPU of the largest machine.
pub const MAX_QUEUE_PAIRS: u16 = 32;

/// The MTUs that a driver may be given: from the smallest of IPv6 to the largest that a frame's
/// length allows.
const MTU_RANGE: std::ops::RangeInclusive<u16> = 1280..=65_520;

/// The configuration of a new network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The hardware address of the guest's interface.
    pub mac: [u8; 6],
    /// The MTU in bytes that the driver is given. With `None` the driver uses its own (1,500).
    pub mtu: Option<u16>,
    /// Pairs of a receive and a transmit queue, 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// The limits on each direction by itself. vhost has no limits, so a limited device takes the
    /// userspace path.
    pub limits: RateLimits,
}

/// The saved state of a network device. New versions are added, old ones are never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetState {
    /// The first version.
    V1(NetStateV1),
}

impl VersionedState for NetState {
    const DEVICE: DeviceName = DEVICE;
}

/// The first version of a network device's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV1 {
    /// The hardware address in the configuration space.
    pub mac: [u8; 6],
    /// The MTU in the configuration space, in bytes.
    pub mtu: Option<u16>,
    /// The number of queue pairs.
    pub queue_pairs: u16,
    /// The features offered, which are decided once by the abilities of the host's taps, or `None`
    /// before that.
    pub offered: Option<u64>,
    /// Whether the link is up.
    pub link_up: bool,
    /// The number of queue pairs that the driver uses.
    pub active_pairs: u16,
    /// The offloads that the driver has chosen by its control queue, as feature bits, or `None`
    /// where it uses those that it negotiated.
    pub guest_offloads: Option<u64>,
    /// Whether the guest must announce itself (gratuitous ARP) when it next runs.
    pub announce: bool,
    /// The limits on each direction by itself.
    pub limits: RateLimits,
}

impl NetState {
    /// The state of a device that no driver has seen yet.
    pub fn fresh(config: NetConfig) -> Self {
        Self::V1(NetStateV1 {
            mac: config.mac,
            mtu: config.mtu,
            queue_pairs: config.queue_pairs,
            offered: None,
            link_up: true,
            active_pairs: 1,
            guest_offloads: None,
            announce: false,
            limits: config.limits,
        })
    }

    /// Reads what [`NetState::encode`] wrote; the bytes may come from another host.
    ///
    /// # Errors
    /// [`DeviceError::State`] where they are not a state, or not one that a device could have.
    pub fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let state = Self::from_bytes(bytes)?;
        let Self::V1(v1) = &state;
        v1.check()?;
        Ok(state)
    }

    /// Encodes the state with its version.
    ///
    /// # Errors
    /// [`DeviceError::State`] where the encoder fails, which plain data does not.
    pub fn encode(&self) -> Result<Vec<u8>, DeviceError> {
        self.to_bytes()
    }

    /// Whether vhost may serve the device.
    pub fn allows_vhost(&self) -> bool {
        let Self::V1(v1) = self;
        v1.limits == RateLimits::default()
    }
}

impl NetStateV1 {
    /// Refuses states that no device could have.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queue_pairs) {
            return Err(DEVICE.state_error(format_args!(
                "{} queue pairs, where 1 to {MAX_QUEUE_PAIRS} are possible",
                self.queue_pairs
            )));
        }
        if !(1..=self.queue_pairs).contains(&self.active_pairs) {
            return Err(DEVICE.state_error(format_args!(
                "{} active of {} queue pairs",
                self.active_pairs, self.queue_pairs
            )));
        }
        let possible = features::offered(self.queue_pairs, self.mtu.is_some(), true);
        if let Some(offered) = self.offered
            && offered & !possible != 0
        {
            return Err(DEVICE.state_error(format_args!(
                "it offers the features {:#x}, which this device does not have",
                offered & !possible
            )));
        }
        if self.mac[0] & 1 == 1 {
            return Err(DEVICE.state_error("its MAC address is a multicast one"));
        }
        if let Some(mtu) = self.mtu
            && !MTU_RANGE.contains(&mtu)
        {
            return Err(DEVICE.state_error(format_args!(
                "an MTU of {mtu}, where {} to {} are possible",
                MTU_RANGE.start(),
                MTU_RANGE.end()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate_limit::Rate;

    fn sample() -> NetStateV1 {
        NetStateV1 {
            mac: [0x02, 0, 0, 0x12, 0x34, 0x56],
            mtu: Some(1400),
            queue_pairs: 4,
            offered: Some(0x2000_0021),
            link_up: true,
            active_pairs: 2,
            guest_offloads: None,
            announce: true,
            limits: RateLimits {
                bytes: None,
                operations: Some(Rate {
                    per_second: 3,
                    burst: 4,
                }),
            },
        }
    }

    #[test]
    fn the_first_version_keeps_its_bytes() {
        let golden = [
            0x00, 0x02, 0x00, 0x00, 0x12, 0x34, 0x56, 0x01, 0xf8, 0x0a, 0x04, 0x01, 0xa1, 0x80,
            0x80, 0x80, 0x02, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0x03, 0x04,
        ];
        let state = NetState::V1(sample());
        assert_eq!(state.encode().unwrap(), golden);
        assert_eq!(NetState::decode(&golden).unwrap(), state);
    }

    #[test]
    fn states_that_no_device_can_have_are_refused() {
        let cases = [
            NetStateV1 {
                queue_pairs: 0,
                ..sample()
            },
            NetStateV1 {
                queue_pairs: 33,
                ..sample()
            },
            NetStateV1 {
                active_pairs: 0,
                ..sample()
            },
            NetStateV1 {
                active_pairs: 5,
                ..sample()
            },
            NetStateV1 {
                mac: [1, 0, 0, 0, 0, 0],
                ..sample()
            },
            NetStateV1 {
                mtu: Some(68),
                ..sample()
            },
            NetStateV1 {
                offered: Some(1 << 63),
                ..sample()
            },
        ];
        for case in cases {
            let bytes = NetState::V1(case.clone()).encode().unwrap();
            assert!(NetState::decode(&bytes).is_err(), "{case:?} was taken");
        }
    }

    #[test]
    fn a_truncated_state_is_refused() {
        let bytes = NetState::V1(sample()).encode().unwrap();
        for end in 0..bytes.len() {
            assert!(NetState::decode(&bytes[..end]).is_err());
        }
    }
}
