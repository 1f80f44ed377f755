//! The saved state of an entropy device, which is empty by design. The version allows for content
//! later.

use serde::{Deserialize, Serialize};

use super::DEVICE;
use crate::state_codec::VersionedState;
use crate::virtio::{DeviceError, DeviceName};

/// The saved form. New versions are added, old ones are never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedRng {
    /// The first version.
    V1(RngState),
}

impl VersionedState for SavedRng {
    const DEVICE: DeviceName = DEVICE;
}

/// An entropy device's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl RngState {
    /// The state of a new device.
    pub fn fresh() -> Self {
        Self {}
    }

    /// Encodes the state with its version.
    pub fn encode(&self) -> Result<Vec<u8>, DeviceError> {
        SavedRng::V1(self.clone()).to_bytes()
    }

    /// Decodes what [`RngState::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let SavedRng::V1(state) = SavedRng::from_bytes(bytes)?;
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_keeps_its_bytes_and_nothing_else_is_taken_for_it() {
        assert_eq!(RngState::fresh().encode().unwrap(), [0]);
        assert_eq!(RngState::decode(&[0]).unwrap(), RngState::fresh());
        for bad in [&[][..], &[1], &[0, 0]] {
            assert!(RngState::decode(bad).is_err());
        }
    }
}
