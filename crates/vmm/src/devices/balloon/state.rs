//! The saved state of a balloon.

use serde::{Deserialize, Serialize};

use super::DEVICE;
use super::{F_DEFLATE_ON_OOM, F_HINT, F_REPORTING, F_STATS};
use crate::state_codec::VersionedState;
use crate::virtio::{DeviceError, DeviceName};

/// The saved form. New versions are added, old ones are never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedBalloon {
    /// The first version.
    V1(BalloonState),
}

impl VersionedState for SavedBalloon {
    const DEVICE: DeviceName = DEVICE;
}

/// The features that the device offers its driver. They are fixed for the life of the guest, also
/// across restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonOffer {
    /// The guest may take pages back from the balloon rather than kill a process.
    pub deflate_on_oom: bool,
    /// The guest sends statistics of its memory.
    pub stats: bool,
    /// The guest reports free pages by itself, so that they are released.
    pub reporting: bool,
    /// The guest names its free pages on request.
    pub hinting: bool,
}

impl Default for BalloonOffer {
    fn default() -> Self {
        Self {
            deflate_on_oom: true,
            stats: true,
            reporting: true,
            hinting: true,
        }
    }
}

impl BalloonOffer {
    pub(super) fn features(self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.deflate_on_oom, F_DEFLATE_ON_OOM)
            | bit(self.stats, F_STATS)
            | bit(self.reporting, F_REPORTING)
            | bit(self.hinting, F_HINT)
    }
}

/// A balloon's state. Built fresh at boot, decoded at restore. Pages are of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// The offered features.
    pub offer: BalloonOffer,
    /// The memory that the guest was asked to give up.
    pub target_pages: u32,
    /// The memory that the guest reports as given up.
    pub actual_pages: u32,
    /// Whether the driver has yet to be told to read its configuration space.
    pub config_changed: bool,
    /// The hinting command in the configuration space.
    pub hint_command: u32,
    /// The id of the last round of hinting. Ids are not used again soon.
    pub last_hint_round: u32,
    /// The interval between requests for statistics, or 0 for no requests.
    pub stats_interval_ms: u64,
    /// The chain of the statistics queue that the device keeps until it asks again.
    pub stats_buffer: Option<u16>,
}

impl BalloonState {
    /// The state of an empty balloon that no driver has seen.
    pub fn fresh(offer: BalloonOffer) -> Self {
        Self {
            offer,
            target_pages: 0,
            actual_pages: 0,
            config_changed: false,
            hint_command: 0,
            last_hint_round: 0,
            stats_interval_ms: 0,
            stats_buffer: None,
        }
    }

    /// Encodes the state with its version.
    pub fn encode(&self) -> Result<Vec<u8>, DeviceError> {
        SavedBalloon::V1(self.clone()).to_bytes()
    }

    /// Decodes and checks what [`BalloonState::encode`] wrote, perhaps on another host.
    pub fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let SavedBalloon::V1(state) = SavedBalloon::from_bytes(bytes)?;
        if state
            .stats_buffer
            .is_some_and(|head| head >= super::QUEUE_SIZE)
        {
            return Err(DEVICE.state_error("it has a statistics buffer that cannot exist"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN_V1: &[u8] = &[0, 1, 1, 0, 1, 0x80, 2, 5, 1, 7, 9, 0xe8, 7, 1, 3];

    fn golden() -> BalloonState {
        BalloonState {
            offer: BalloonOffer {
                reporting: false,
                ..BalloonOffer::default()
            },
            target_pages: 256,
            actual_pages: 5,
            config_changed: true,
            hint_command: 7,
            last_hint_round: 9,
            stats_interval_ms: 1000,
            stats_buffer: Some(3),
        }
    }

    #[test]
    fn version_1_keeps_its_bytes() {
        assert_eq!(golden().encode().unwrap(), GOLDEN_V1);
        assert_eq!(BalloonState::decode(GOLDEN_V1).unwrap(), golden());
    }

    #[test]
    fn cut_padded_or_impossible_states_are_refused() {
        for len in 0..GOLDEN_V1.len() {
            assert!(BalloonState::decode(&GOLDEN_V1[..len]).is_err());
        }
        assert!(BalloonState::decode(&[GOLDEN_V1, &[0]].concat()).is_err());
        let mut impossible = golden();
        impossible.stats_buffer = Some(super::super::QUEUE_SIZE);
        assert!(BalloonState::decode(&impossible.encode().unwrap()).is_err());
    }
}
