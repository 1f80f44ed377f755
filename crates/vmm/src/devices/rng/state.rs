//! What an entropy device remembers: nothing, by design. The version is there for the day it does.

use serde::{Deserialize, Serialize};

use crate::virtio::DeviceError;

/// The saved form, by version. Never change a version: add one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedRng {
    /// The first.
    V1(RngState),
}

/// An entropy device's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl RngState {
    /// The state of a new device.
    pub fn fresh() -> Self {
        Self {}
    }

    /// Encodes it with its version.
    pub fn encode(&self) -> Result<Vec<u8>, DeviceError> {
        postcard::to_stdvec(&SavedRng::V1(self.clone())).map_err(refused)
    }

    /// Decodes what [`RngState::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let (SavedRng::V1(state), rest) = postcard::take_from_bytes(bytes).map_err(refused)?;
        if !rest.is_empty() {
            return Err(refused(format_args!("{} bytes too many", rest.len())));
        }
        Ok(state)
    }
}

fn refused(reason: impl std::fmt::Display) -> DeviceError {
    DeviceError::State {
        device: super::NAME,
        reason: reason.to_string(),
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
