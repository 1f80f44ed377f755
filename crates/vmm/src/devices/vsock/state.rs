//! The saved state of a vsock device. It is small, because connections end at a restore.

use serde::{Deserialize, Serialize};

use super::DEVICE;
use crate::state_codec::VersionedState;
use crate::virtio::{DeviceError, DeviceName};

/// The first port used on the host's side of connections that the host starts.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The saved form. New versions are added, old ones are never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedVsock {
    /// The first version.
    V1(VsockState),
}

impl VersionedState for SavedVsock {
    const DEVICE: DeviceName = DEVICE;
}

/// A vsock device's state. Built fresh at boot, decoded at restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id (3 to 2^32 - 2).
    pub guest_cid: u64,
    /// The next port for the host's side. It is not reset by a restore, so that packets which the
    /// guest still sends on connections from before cannot be taken for a new connection's.
    pub next_host_port: u32,
    /// Whether the guest may have had connections, so that it must be told at once that they are
    /// gone.
    pub transport_reset: bool,
}

impl VsockState {
    /// The state of a device that no driver has seen.
    pub fn fresh(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            next_host_port: FIRST_HOST_PORT,
            transport_reset: false,
        }
    }

    /// Encodes the state with its version.
    pub fn encode(&self) -> Result<Vec<u8>, DeviceError> {
        SavedVsock::V1(self.clone()).to_bytes()
    }

    /// Decodes and checks what [`VsockState::encode`] wrote, perhaps on another host.
    pub fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let SavedVsock::V1(state) = SavedVsock::from_bytes(bytes)?;
        state.check()?;
        Ok(state)
    }

    /// Refuses context ids that no guest can have.
    pub fn check(&self) -> Result<(), DeviceError> {
        if (3..u64::from(u32::MAX)).contains(&self.guest_cid) {
            Ok(())
        } else {
            Err(DEVICE.state_error(format_args!(
                "{} cannot be a guest's context id",
                self.guest_cid
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN_V1: &[u8] = &[0, 42, 0x83, 0x80, 0x80, 0x80, 0x04, 1];

    fn golden() -> VsockState {
        VsockState {
            guest_cid: 42,
            next_host_port: FIRST_HOST_PORT + 3,
            transport_reset: true,
        }
    }

    #[test]
    fn version_1_keeps_its_bytes() {
        assert_eq!(golden().encode().unwrap(), GOLDEN_V1);
        assert_eq!(VsockState::decode(GOLDEN_V1).unwrap(), golden());
    }

    #[test]
    fn cut_padded_or_impossible_states_are_refused() {
        for len in 0..GOLDEN_V1.len() {
            assert!(VsockState::decode(&GOLDEN_V1[..len]).is_err());
        }
        assert!(VsockState::decode(&[GOLDEN_V1, &[0]].concat()).is_err());
        for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 40] {
            let bytes = VsockState::fresh(cid).encode().unwrap();
            assert!(VsockState::decode(&bytes).is_err());
        }
    }
}
