//! The common configuration structure: negotiation, device status and the queues' registers.
//!
//! Source: VIRTIO 1.3, 4.1.4.3 (layout), 2.1 (status), 3.1 (initialisation).

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::interrupt::{NO_VECTOR, PciInterrupt};
use crate::virtio::SavedQueue;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 0x40;

/// Offsets of the registers (4.1.4.3), each named as there.
mod register {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0C;
    pub(super) const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1A;
    pub(super) const QUEUE_ENABLE: u64 = 0x1C;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1E;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    pub(super) const END: u64 = 0x38;
}

/// The request of a register write to the transport.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Nothing,
    Reset,
    Activate,
}

/// A queue as its registers describe it.
pub(super) struct QueueRegisters {
    pub(super) saved: SavedQueue,
}

/// The saved state of the registers, with the interrupt vectors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CommonState {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    offered: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<SavedQueue>,
    pub(super) config_vector: u16,
    pub(super) queue_vectors: Vec<u16>,
}

impl CommonState {
    /// Stores the vectors, which the interrupt has.
    pub(super) fn msix_vectors(&mut self, interrupt: &PciInterrupt) {
        self.config_vector = interrupt.config_vector();
        let queues = self.queues.len() as u16;
        self.queue_vectors = (0..queues)
            .map(|queue| interrupt.queue_vector(queue))
            .collect();
    }

    /// Stores the present position of a queue that the device serves.
    pub(super) fn set_queue(&mut self, index: u16, queue: SavedQueue) {
        if let Some(slot) = self.queues.get_mut(usize::from(index)) {
            *slot = queue;
        }
    }
}

pub(super) struct CommonConfig {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    offered: u64,
    status: u8,
    queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
}

impl CommonConfig {
    pub(super) fn new(features: u64, max_sizes: &[u16]) -> Self {
        let queues = max_sizes.iter().map(|&max_size| QueueRegisters {
            saved: idle(max_size),
        });
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            offered: offered(features),
            status: 0,
            queue_select: 0,
            queues: queues.collect(),
        }
    }

    pub(super) fn reset(&mut self) {
        let max_sizes: Vec<u16> = self
            .queues
            .iter()
            .map(|queue| queue.saved.max_size)
            .collect();
        *self = Self::new(self.offered, &max_sizes);
    }

    pub(super) fn agreed_features(&self) -> u64 {
        self.driver_features & self.offered
    }

    pub(super) fn is_driver_ready(&self) -> bool {
        self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK
    }

    pub(super) fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    fn queue(&self) -> Option<&SavedQueue> {
        self.queues
            .get(usize::from(self.queue_select))
            .map(|queue| &queue.saved)
    }

    /// The selected queue, unless it is enabled and may no longer be configured.
    fn idle_queue(&mut self) -> Option<&mut SavedQueue> {
        let queue = &mut self.queues.get_mut(usize::from(self.queue_select))?.saved;
        (!queue.ready).then_some(queue)
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8], interrupt: &PciInterrupt) {
        // The driver reads each field with its own width; an access within a field's bytes is
        // answered from them.
        let mut registers = [0u8; register::END as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            registers[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        };
        put(
            register::DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(
            register::DEVICE_FEATURE,
            &half(self.offered, self.device_feature_select),
        );
        put(
            register::DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(
            register::DRIVER_FEATURE,
            &half(self.driver_features, self.driver_feature_select),
        );
        put(
            register::CONFIG_MSIX_VECTOR,
            &interrupt.config_vector().to_le_bytes(),
        );
        put(
            register::NUM_QUEUES,
            &(self.queues.len() as u16).to_le_bytes(),
        );
        put(register::DEVICE_STATUS, &[self.status]);
        // Devices change multi-byte fields under the transport's lock, so that an access sees them
        // whole. The generation never changes.
        put(register::CONFIG_GENERATION, &[0]);
        put(register::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queue() {
            put(register::QUEUE_SIZE, &queue.size.to_le_bytes());
            let vector = interrupt.queue_vector(self.queue_select);
            put(register::QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
            put(
                register::QUEUE_ENABLE,
                &u16::from(queue.ready).to_le_bytes(),
            );
            put(register::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(register::QUEUE_DESC, &queue.desc_table.to_le_bytes());
            put(register::QUEUE_DRIVER, &queue.avail_ring.to_le_bytes());
            put(register::QUEUE_DEVICE, &queue.used_ring.to_le_bytes());
        }
        crate::bus::read_at(&registers, offset, data);
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8], interrupt: &PciInterrupt) -> Request {
        let mut bytes = [0; 8];
        let len = data.len().min(8);
        bytes[..len].copy_from_slice(&data[..len]);
        let value = u64::from_le_bytes(bytes);
        let negotiating = self.status & STATUS_FEATURES_OK == 0;
        match (offset, len) {
            (register::DEVICE_STATUS, 1) => return self.write_status(value as u8),
            (register::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (register::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (register::DRIVER_FEATURE, 4) if negotiating => {
                set_half(
                    &mut self.driver_features,
                    self.driver_feature_select,
                    value as u32,
                );
            }
            (register::CONFIG_MSIX_VECTOR, 2) => interrupt.set_config_vector(value as u16),
            (register::QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (register::QUEUE_MSIX_VECTOR, 2) => {
                interrupt.set_queue_vector(self.queue_select, value as u16);
            }
            _ => self.write_queue(offset, len, value),
        }
        Request::Nothing
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let event_idx = self.agreed_features() & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let Some(queue) = self.idle_queue() else {
            return;
        };
        match (offset, len) {
            (register::QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.size = size;
                }
            }
            (register::QUEUE_ENABLE, 2) if value == 1 => {
                queue.ready = true;
                queue.event_idx = event_idx;
            }
            _ => {
                for (start, field) in [
                    (register::QUEUE_DESC, &mut queue.desc_table),
                    (register::QUEUE_DRIVER, &mut queue.avail_ring),
                    (register::QUEUE_DEVICE, &mut queue.used_ring),
                ] {
                    match (offset.wrapping_sub(start), len) {
                        (0, 8) => *field = value,
                        (0, 4) => set_half(field, 0, value as u32),
                        (4, 4) => set_half(field, 1, value as u32),
                        _ => {}
                    }
                }
            }
        }
    }

    fn write_status(&mut self, value: u8) -> Request {
        if value == 0 {
            return Request::Reset;
        }
        let added = value & !self.status;
        // The driver may not clear bits except by a reset, nor set the device's own.
        self.status |= value & !STATUS_NEEDS_RESET;
        if added & STATUS_FEATURES_OK != 0 && !self.features_acceptable() {
            self.status &= !STATUS_FEATURES_OK;
        }
        let ready = added & STATUS_DRIVER_OK != 0 && self.status & STATUS_FEATURES_OK != 0;
        if ready {
            Request::Activate
        } else {
            Request::Nothing
        }
    }

    /// Whether the driver takes the 1.x interface and no feature that was not offered.
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    pub(super) fn save(&self) -> CommonState {
        CommonState {
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            offered: self.offered,
            status: self.status,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(|queue| queue.saved).collect(),
            config_vector: NO_VECTOR,
            queue_vectors: Vec::new(),
        }
    }

    /// Checks that the registers of a device that offers `features` can have these values.
    pub(super) fn check(&self, state: &CommonState, features: u64) -> Result<(), String> {
        let unknown = state.driver_features & !offered(features);
        if unknown != 0 {
            return Err(format!(
                "the driver uses features {unknown:#x} that this host does not offer"
            ));
        }
        let same_queue =
            |(mine, saved): (&QueueRegisters, &SavedQueue)| mine.saved.max_size == saved.max_size;
        if state.queues.len() != self.queues.len()
            || !self.queues.iter().zip(&state.queues).all(same_queue)
        {
            return Err("its queues differ in number or largest size".to_owned());
        }
        Ok(())
    }

    /// Takes over saved registers, of a device that offers `features`.
    pub(super) fn restore(&mut self, state: &CommonState, features: u64) -> Result<(), String> {
        self.check(state, features)?;
        self.offered = offered(features);
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.driver_features = state.driver_features;
        self.status = state.status;
        self.queue_select = state.queue_select;
        self.queues = state
            .queues
            .iter()
            .map(|&saved| QueueRegisters { saved })
            .collect();
        Ok(())
    }
}

/// The features of a device and of this transport.
fn offered(features: u64) -> u64 {
    features | 1 << VIRTIO_F_VERSION_1
}

fn idle(max_size: u16) -> SavedQueue {
    SavedQueue {
        max_size,
        size: max_size,
        ready: false,
        event_idx: false,
        next_avail: 0,
        next_used: 0,
        desc_table: 0,
        avail_ring: 0,
        used_ring: 0,
    }
}

/// The 32 bits that `select` chooses of a feature set; beyond 64 bits there are none.
fn half(value: u64, select: u32) -> [u8; 4] {
    match select {
        0 => (value as u32).to_le_bytes(),
        1 => ((value >> 32) as u32).to_le_bytes(),
        _ => [0; 4],
    }
}

fn set_half(field: &mut u64, select: u32, value: u32) {
    match select {
        0 => *field = *field & 0xFFFF_FFFF_0000_0000 | u64::from(value),
        1 => *field = *field & 0xFFFF_FFFF | u64::from(value) << 32,
        _ => {}
    }
}
