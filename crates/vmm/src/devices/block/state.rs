//! The saved state and the configuration space of a block device.
//!
//! Source: VIRTIO 1.3, 5.2.3 (feature bits) and 5.2.4 (configuration layout).

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{DEVICE, SECTOR};
use crate::rate_limit::RateLimits;
use crate::state_codec::VersionedState;
use crate::virtio::{DeviceError, DeviceName};

/// The most queues that a device may have, which is one per vCPU of the largest machine.
pub const MAX_QUEUES: u16 = 32;
/// The length of a device's id string in bytes.
pub const ID_BYTES: usize = 20;
/// The size of each queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// The most data segments of a request: the size of a queue, without header and status.
pub(super) const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The longest segment in bytes. It may grow and never shrink, because guests in templates rely on
/// it.
pub(super) const SIZE_MAX: u32 = 1 << 20;
/// The longest discard or zeroing in sectors. It is 1 GiB, so that a pause does not wait long for
/// one.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 21;

/// The configuration of a new block device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockConfig {
    /// The disk's serial number, which is cut at [`ID_BYTES`].
    pub id: String,
    /// The number of queues, 1 to [`MAX_QUEUES`]; 0 stands for 1.
    pub queues: u16,
    /// The limits on the guest's reads and writes together.
    pub limits: RateLimits,
}

/// The saved state of a block device. New versions are added, old ones are never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockState {
    /// The first version.
    V1(BlockStateV1),
}

impl VersionedState for BlockState {
    const DEVICE: DeviceName = DEVICE;
}

/// The first version of a block device's state. The buckets of its limits are not saved: a
/// restored device starts with full ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStateV1 {
    /// The id string.
    pub id: [u8; ID_BYTES],
    /// Queues.
    pub queues: u16,
    /// The limits.
    pub limits: RateLimits,
    /// The disk's properties that the guest knows, or `None` before a disk was attached.
    pub disk: Option<DiskProperties>,
}

/// The properties of a disk that a running guest relies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskProperties {
    /// Its size in bytes.
    pub size: u64,
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// The unit in bytes that is cheapest to write.
    pub block_size: u32,
}

impl BlockState {
    /// The state of a device that no driver has seen yet.
    pub fn fresh(config: &BlockConfig) -> Self {
        let mut id = [0; ID_BYTES];
        let len = config.id.len().min(ID_BYTES);
        id[..len].copy_from_slice(&config.id.as_bytes()[..len]);
        Self::V1(BlockStateV1 {
            id,
            queues: config.queues.max(1),
            limits: config.limits,
            disk: None,
        })
    }

    /// Decodes a saved state.
    ///
    /// # Errors
    /// [`DeviceError::State`] where `bytes` are no such state.
    pub fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        Self::from_bytes(bytes)
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, DeviceError> {
        self.to_bytes()
    }
}

impl BlockStateV1 {
    /// Attaches a disk. A new device takes its properties; a saved device must have had the same.
    pub(super) fn attach(mut self, disk: DiskProperties) -> Result<Self, DeviceError> {
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(DEVICE.state_error(format_args!(
                "it has {} queues, and 1 to {MAX_QUEUES} are possible",
                self.queues
            )));
        }
        if let Some(seen) = self.disk {
            if (seen.size, seen.read_only) != (disk.size, disk.read_only) {
                return Err(DEVICE.state_error(format_args!(
                    "the guest knows a disk of {} bytes ({}), and this disk has {} bytes ({})",
                    seen.size,
                    access(seen.read_only),
                    disk.size,
                    access(disk.read_only)
                )));
            }
            return Ok(self);
        }
        self.disk = Some(disk);
        Ok(self)
    }

    /// The features offered.
    pub(super) fn features(&self) -> u64 {
        let read_only = self.disk.is_some_and(|disk| disk.read_only);
        let mut bits = vec![
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        if read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        if self.queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        bits.into_iter()
            .fold(0, |features, bit| features | 1 << bit)
    }

    /// The configuration space, little endian.
    pub(super) fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let disk = self.disk.unwrap_or(DiskProperties {
            size: 0,
            read_only: true,
            block_size: SECTOR as u32,
        });
        let sectors_per_block = disk.block_size / SECTOR as u32;
        let mut space = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(disk.size / SECTOR).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Topology: logical blocks in a physical one (as a power of two), alignment, and the
        // smallest and best sizes of a request in logical blocks.
        put(24, &[sectors_per_block.trailing_zeros() as u8, 0]);
        put(26, &(sectors_per_block as u16).to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_ZERO_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &sectors_per_block.to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        // A zeroing may release space.
        put(56, &[1]);
        space
    }
}

/// The length of the configuration space, which ends with the limits of zeroing.
pub(super) const CONFIG_BYTES: usize = 60;

fn access(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "writable" }
}
