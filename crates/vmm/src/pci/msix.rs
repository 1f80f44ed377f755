//! MSI-X: a table of messages, one per vector, each raised through an eventfd.
//!
//! A vector's eventfd is connected to KVM (irqfd) exactly while the vector is unmasked. A device
//! writes to the eventfd in any case. A write that was made while the vector was masked stays in
//! the eventfd's counter, and is raised when KVM is connected again. So no pending bits are kept,
//! and vhost can use the eventfd without knowing of masks.
//!
//! Source: PCI Local Bus Specification 3.0, 6.8.2.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::irq::{Gsi, IrqRoutes, MsiMessage};

/// The size of a table entry in bytes: address, data, vector control.
pub const ENTRY_SIZE: u64 = 16;
const VECTOR_CONTROL: usize = 12;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// The saved state of a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct VectorState {
    message: MsiMessage,
    masked: bool,
    /// Whether the vector was raised while it could not be delivered.
    pending: bool,
}

/// The saved state of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    vectors: Vec<VectorState>,
}

struct Vector {
    fd: EventFd,
    gsi: Gsi,
    message: MsiMessage,
    masked: bool,
    connected: bool,
}

/// The MSI-X table of a function.
pub struct MsixTable {
    irq_routes: Arc<dyn IrqRoutes>,
    control: u16,
    vectors: Vec<Vector>,
}

impl MsixTable {
    /// A table of `count` vectors, all masked, as after a reset.
    pub fn new(irq_routes: Arc<dyn IrqRoutes>, count: u16) -> io::Result<Self> {
        let vector = |_| {
            Ok(Vector {
                fd: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
                gsi: irq_routes.allocate()?,
                message: MsiMessage::default(),
                masked: true,
                connected: false,
            })
        };
        let vectors = (0..count).map(vector).collect::<io::Result<_>>()?;
        Ok(Self {
            irq_routes,
            control: 0,
            vectors,
        })
    }

    /// The eventfds of all vectors, in order; a write raises the vector.
    pub fn eventfds(&self) -> io::Result<Vec<EventFd>> {
        self.vectors
            .iter()
            .map(|vector| vector.fd.try_clone())
            .collect()
    }

    /// The message control word of the capability, table size included.
    pub fn control(&self) -> u16 {
        self.control | (self.vectors.len() as u16 - 1)
    }

    /// The guest wrote the message control word.
    pub fn set_control(&mut self, value: u16) {
        self.control = value & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        for index in 0..self.vectors.len() {
            self.update(index);
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let index = (offset / ENTRY_SIZE) as usize;
        let Some(vector) = self.vectors.get(index) else {
            return data.fill(0);
        };
        crate::bus::read_at(&encode(vector), offset % ENTRY_SIZE, data);
    }

    /// Writes the table. Accesses must be aligned and of 4 or 8 bytes, as the specification
    /// demands; others are ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let index = (offset / ENTRY_SIZE) as usize;
        let at = (offset % ENTRY_SIZE) as usize;
        let aligned = matches!(data.len(), 4 | 8) && at.is_multiple_of(data.len());
        let Some(vector) = self.vectors.get_mut(index).filter(|_| aligned) else {
            return;
        };
        let mut entry = encode(vector);
        entry[at..at + data.len()].copy_from_slice(data);
        let field = |at: usize| {
            u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
        };
        vector.message = MsiMessage {
            address: u64::from(field(0)) | u64::from(field(4)) << 32,
            data: field(8),
        };
        vector.masked = entry[VECTOR_CONTROL] & 1 != 0;
        self.update(index);
    }

    /// Reads the pending bits, of the vectors that were raised while they are masked.
    ///
    /// Reading a counter clears it, so it is written back at once.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let mut bits = vec![0u8; self.vectors.len().div_ceil(64) * 8];
        for (index, vector) in self.vectors.iter().enumerate() {
            if vector.is_pending() {
                bits[index / 8] |= 1 << (index % 8);
            }
        }
        crate::bus::read_at(&bits, offset, data);
    }

    /// Updates KVM with the vector's mask and message. If KVM refuses, the vector stays
    /// disconnected, and the guest loses only its own interrupts.
    fn update(&mut self, index: usize) {
        let open = self.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        let vector = &mut self.vectors[index];
        let result = if open && !vector.masked {
            let routed = self.irq_routes.set_route(vector.gsi, vector.message);
            routed.and_then(|()| vector.connect(self.irq_routes.as_ref()))
        } else {
            vector.disconnect(self.irq_routes.as_ref())
        };
        if let Err(error) = result {
            tracing::warn!(vector = index, %error, "MSI-X vector could not be connected");
        }
    }

    /// The state to be saved. It is exact only while the devices and the vCPUs are paused.
    pub fn save(&self) -> MsixState {
        let vector = |vector: &Vector| VectorState {
            message: vector.message,
            masked: vector.masked,
            pending: vector.is_pending(),
        };
        MsixState {
            control: self.control,
            vectors: self.vectors.iter().map(vector).collect(),
        }
    }

    /// Checks that a saved table has as many vectors as this one.
    pub fn check(&self, state: &MsixState) -> Result<(), String> {
        if state.vectors.len() != self.vectors.len() {
            return Err(format!(
                "{} MSI-X vectors when saved, {} in this machine",
                state.vectors.len(),
                self.vectors.len()
            ));
        }
        Ok(())
    }

    /// Restores a saved table and connects its vectors. The interrupts that are pending afterwards
    /// are those of the saved state alone. Vectors that are connected as they were stay so, because
    /// each change waits for all CPUs of the host.
    pub fn restore(&mut self, state: &MsixState) -> Result<(), String> {
        self.check(state)?;
        for (vector, saved) in self.vectors.iter_mut().zip(&state.vectors) {
            vector.message = saved.message;
            vector.masked = saved.masked;
            if !vector.connected {
                // Empty counters return EAGAIN, which is no error here.
                let _ = vector.fd.read();
            }
        }
        self.set_control(state.control);
        for (vector, saved) in self.vectors.iter().zip(&state.vectors) {
            if saved.pending {
                vector
                    .fd
                    .write(1)
                    .map_err(|error| format!("cannot mark a vector: {error}"))?;
            }
        }
        Ok(())
    }

    /// Returns to the state after power-on. Pending interrupts are dropped.
    pub fn reset(&mut self) {
        for vector in &mut self.vectors {
            vector.masked = true;
            vector.message = MsiMessage::default();
        }
        self.set_control(0);
        for vector in &self.vectors {
            // Empty counters return EAGAIN, which is no error here.
            let _ = vector.fd.read();
        }
    }
}

impl Vector {
    fn connect(&mut self, irq_routes: &dyn IrqRoutes) -> io::Result<()> {
        if !self.connected {
            irq_routes.connect(&self.fd, self.gsi)?;
            self.connected = true;
        }
        Ok(())
    }

    fn disconnect(&mut self, irq_routes: &dyn IrqRoutes) -> io::Result<()> {
        if self.connected {
            irq_routes.disconnect(&self.fd, self.gsi)?;
            self.connected = false;
        }
        Ok(())
    }

    /// KVM takes the counter of a connected vector at once, so only a disconnected vector can be
    /// pending.
    fn is_pending(&self) -> bool {
        let pending = !self.connected && self.fd.read().is_ok();
        if pending {
            // The eventfd was readable, so its counter is 0 now and a write cannot overflow it.
            let _ = self.fd.write(1);
        }
        pending
    }
}

fn encode(vector: &Vector) -> [u8; ENTRY_SIZE as usize] {
    let mut entry = [0; ENTRY_SIZE as usize];
    entry[..8].copy_from_slice(&vector.message.address.to_le_bytes());
    entry[8..12].copy_from_slice(&vector.message.data.to_le_bytes());
    entry[VECTOR_CONTROL] = u8::from(vector.masked);
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::RecordingIrqRoutes;

    fn table() -> (MsixTable, Arc<RecordingIrqRoutes>) {
        let irq_routes = Arc::new(RecordingIrqRoutes::default());
        (MsixTable::new(irq_routes.clone(), 3).unwrap(), irq_routes)
    }

    fn program(table: &mut MsixTable, vector: u64, address: u64, data: u32, masked: bool) {
        table.write_table(vector * 16, &address.to_le_bytes());
        table.write_table(vector * 16 + 8, &data.to_le_bytes());
        table.write_table(vector * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    #[test]
    fn a_vector_is_wired_only_while_enabled_and_unmasked() {
        let (mut table, irq_routes) = table();
        program(&mut table, 1, 0xFEE0_1000, 0x31, false);
        assert!(irq_routes.connected.lock().unwrap().is_empty());
        table.set_control(CONTROL_ENABLE);
        assert_eq!(*irq_routes.connected.lock().unwrap(), [25]);
        assert_eq!(
            irq_routes.routes.lock().unwrap()[&25],
            MsiMessage {
                address: 0xFEE0_1000,
                data: 0x31
            }
        );
        table.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        assert!(irq_routes.connected.lock().unwrap().is_empty());
    }

    #[test]
    fn what_is_raised_while_masked_is_pending_and_survives_a_save() {
        let (mut table, _) = table();
        program(&mut table, 2, 0xFEE0_0000, 0x40, true);
        table.set_control(CONTROL_ENABLE);
        table.eventfds().unwrap()[2].write(1).unwrap();
        let mut bits = [0; 8];
        table.read_pending(0, &mut bits);
        assert_eq!(bits[0], 0b100);
        let state = table.save();
        let (mut copy, _) = self::table();
        copy.restore(&state).unwrap();
        assert_eq!(copy.save(), state);
    }

    #[test]
    fn odd_accesses_are_survived() {
        let (mut table, _) = table();
        for (offset, len) in [(13, 4), (3 * 16, 4), (u64::MAX - 3, 4), (4, 8), (0, 2)] {
            table.write_table(offset, &vec![0xFF; len]);
            table.read_table(offset, &mut vec![0; len]);
        }
        assert_eq!(table.save(), self::table().0.save());
    }

    #[test]
    fn a_state_with_other_vectors_is_refused() {
        let (table, irq_routes) = table();
        let mut smaller = MsixTable::new(irq_routes, 2).unwrap();
        assert!(smaller.restore(&table.save()).is_err());
    }
}
