//! The saved state and the configuration space of a virtio-fs device.

use clone_fuse::link::MAX_TABLES;
use serde::{Deserialize, Serialize};

use super::DEVICE;
use crate::state_codec::VersionedState;
use crate::virtio::{DeviceError, DeviceName};

/// The longest tag, in bytes (VIRTIO 1.3, 5.11.4).
pub const MAX_TAG: usize = 36;
/// The number of bytes of the configuration space.
pub(super) const CONFIG_BYTES: usize = MAX_TAG + 4;

/// The saved form. New versions are added, old ones are never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedFs {
    /// The first version.
    V1(FsState),
}

impl VersionedState for SavedFs {
    const DEVICE: DeviceName = DEVICE;
}

/// A virtio-fs device's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// The name by which the guest mounts the share.
    pub tag: String,
    /// What the share's server knows of the guest, which only a server reads; `None` where the server
    /// has failed.
    pub tables: Option<Vec<u8>>,
}

impl FsState {
    /// Encodes the state with its version.
    pub fn encode(&self) -> Result<Vec<u8>, DeviceError> {
        SavedFs::V1(self.clone()).to_bytes()
    }

    /// Decodes and checks what [`FsState::encode`] wrote, perhaps on another host.
    pub fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let SavedFs::V1(state) = SavedFs::from_bytes(bytes)?;
        check_tag(&state.tag)?;
        match state.tables.as_ref().map_or(0, Vec::len) {
            0..=MAX_TABLES => Ok(state),
            len => Err(DEVICE.state_error(format_args!("it has {len} bytes of tables"))),
        }
    }
}

/// Refuses a tag that the configuration space cannot hold.
pub(super) fn check_tag(tag: &str) -> Result<(), DeviceError> {
    match tag.len() {
        1..=MAX_TAG => Ok(()),
        len => Err(DEVICE.state_error(format_args!("a tag of {len} bytes"))),
    }
}

/// The configuration space: the tag, and one request queue.
pub(super) fn config_space(tag: &str) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    space[..tag.len()].copy_from_slice(tag.as_bytes());
    space[MAX_TAG] = 1;
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_keeps_its_bytes() {
        let state = FsState {
            tag: "src".to_owned(),
            tables: Some(vec![7, 8]),
        };
        let bytes = [0, 3, b's', b'r', b'c', 1, 2, 7, 8];
        assert_eq!(state.encode().unwrap(), bytes);
        assert_eq!(FsState::decode(&bytes).unwrap(), state);
        for len in 0..bytes.len() {
            assert!(FsState::decode(&bytes[..len]).is_err());
        }
        assert!(FsState::decode(&[0, 0, 0]).is_err());
        assert_eq!(FsState::decode(&[0, 1, b'x', 0]).unwrap().tables, None);
    }
}
