//! The one encoding of saved state, for devices and for the sections of a machine's state file.
//!
//! Saved bytes may come from another host or from an attacker. A value is in postcard's encoding,
//! and [`decode`] refuses bytes that follow it. A device's state is an enum with one variant for
//! each version ([`VersionedState`]): a new version is a new variant, and no variant ever changes,
//! since its bytes are kept in templates.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::virtio::{DeviceError, DeviceName};

/// Why a value could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The value could not be encoded, which does not happen to plain data.
    #[error("the value cannot be encoded: {0}")]
    Encode(postcard::Error),
    /// The bytes are not an encoded value of the wanted type.
    #[error("the bytes cannot be decoded: {0}")]
    Decode(postcard::Error),
    /// More bytes follow the value.
    #[error("{bytes} bytes follow the value")]
    TrailingBytes {
        /// The number of bytes that follow the value.
        bytes: usize,
    },
}

/// Encodes `value`.
///
/// # Errors
/// [`CodecError::Encode`], which plain data does not cause.
pub fn encode(value: &impl Serialize) -> Result<Vec<u8>, CodecError> {
    postcard::to_stdvec(value).map_err(CodecError::Encode)
}

/// Decodes a value that takes up all of `bytes`.
///
/// # Errors
/// [`CodecError`] where `bytes` are no such value, or more than one.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(CodecError::Decode)?;
    match rest.len() {
        0 => Ok(value),
        bytes => Err(CodecError::TrailingBytes { bytes }),
    }
}

/// The saved state of a kind of device: an enum with one variant for each version.
pub trait VersionedState: Serialize + DeserializeOwned {
    /// The device that errors name.
    const DEVICE: DeviceName;

    /// Encodes the state with its version.
    ///
    /// # Errors
    /// [`DeviceError::State`], which plain data does not cause.
    fn to_bytes(&self) -> Result<Vec<u8>, DeviceError> {
        encode(self).map_err(|error| Self::DEVICE.state_error(error))
    }

    /// Decodes what [`VersionedState::to_bytes`] wrote, here or on another host.
    ///
    /// # Errors
    /// [`DeviceError::State`] where `bytes` are no such state.
    fn from_bytes(bytes: &[u8]) -> Result<Self, DeviceError> {
        decode(bytes).map_err(|error| Self::DEVICE.state_error(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    enum Saved {
        V1(Vec<u32>),
    }

    impl VersionedState for Saved {
        const DEVICE: DeviceName = DeviceName::new("example");
    }

    #[test]
    fn an_error_names_the_device() {
        let error = Saved::from_bytes(&[7]).unwrap_err();
        assert!(error.to_string().starts_with("example device:"), "{error}");
    }

    proptest! {
        #[test]
        fn a_state_is_decoded_whole_or_not_at_all(
            values in prop::collection::vec(any::<u32>(), 0..9),
            extra in prop::collection::vec(any::<u8>(), 1..9),
        ) {
            let state = Saved::V1(values);
            let bytes = state.to_bytes().unwrap();
            for len in 0..bytes.len() {
                prop_assert!(Saved::from_bytes(&bytes[..len]).is_err());
            }
            let padded = [bytes.as_slice(), extra.as_slice()].concat();
            prop_assert!(Saved::from_bytes(&padded).is_err());
            prop_assert_eq!(Saved::from_bytes(&bytes).unwrap(), state);
        }
    }
}
