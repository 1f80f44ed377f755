//! A queue's position as it is saved: `virtio_queue::QueueState` with names that we own, because
//! that type has no serialised form and may change with the crate.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

/// The saved form of a queue. Addresses are guest-physical, sizes in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// The largest size that the device offered.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// Whether the driver enabled it.
    pub ready: bool,
    /// Whether `VIRTIO_F_EVENT_IDX` was agreed on.
    pub event_idx: bool,
    /// The next entry of the available ring that the device will read.
    pub next_avail: u16,
    /// The next entry of the used ring that the device will write.
    pub next_used: u16,
    /// The descriptor table.
    pub desc_table: u64,
    /// The available ring.
    pub avail_ring: u64,
    /// The used ring.
    pub used_ring: u64,
}

impl From<&Queue> for SavedQueue {
    fn from(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc_table: queue.desc_table(),
            avail_ring: queue.avail_ring(),
            used_ring: queue.used_ring(),
        }
    }
}

impl TryFrom<SavedQueue> for Queue {
    type Error = virtio_queue::Error;

    fn try_from(saved: SavedQueue) -> Result<Self, Self::Error> {
        Queue::try_from(QueueState {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_comes_back_where_it_was() {
        let saved = SavedQueue {
            max_size: 256,
            size: 128,
            ready: true,
            event_idx: true,
            next_avail: 65_535,
            next_used: 12,
            desc_table: 0x1000,
            avail_ring: 0x2000,
            used_ring: 0x3000,
        };
        assert_eq!(SavedQueue::from(&Queue::try_from(saved).unwrap()), saved);
    }

    #[test]
    fn a_hostile_queue_size_is_refused() {
        let mut saved = SavedQueue::from(&Queue::new(256).unwrap());
        saved.size = 300;
        assert!(Queue::try_from(saved).is_err());
    }
}
