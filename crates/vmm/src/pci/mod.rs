//! PCI: one bus behind a host bridge, reached by memory-mapped configuration (ECAM), with message
//! signalled interrupts only.
//!
//! [`PciDevice`] is the contract of a device on the bus; [`PciBus`] dispatches configuration and
//! BAR accesses to the device in a slot. The VMM assigns addresses before the guest runs (there is
//! no firmware), and the guest may change them. Virtio's transport is in [`virtio_pci`].
//!
//! Source: PCI Local Bus Specification 3.0; PCI Express Base Specification, 7.2.2 (ECAM).

mod bus;
pub mod config;
pub mod msix;
pub mod virtio_pci;

pub use bus::{EcamWindow, MmioWindow, PciBus};
pub use config::{BarRange, ConfigSpace, Identity};

/// Start of the window that BARs are placed in (guest-physical).
pub const MMIO32_BASE: u64 = 0xC000_0000;
/// Its size in bytes.
pub const MMIO32_SIZE: u64 = 0x2000_0000;
/// The configuration window (ECAM) of bus 0.
pub const ECAM_BASE: u64 = 0xE000_0000;
/// Its size: one bus of 32 slots and 8 functions, 4 KiB each.
pub const ECAM_SIZE: u64 = 1 << 20;
// The windows do not overlap each other and lie outside RAM, or the crate does not compile.
const _: () = {
    use clone_memory::layout::{PCI_HOLE_END, PCI_HOLE_START};
    assert!(PCI_HOLE_START <= MMIO32_BASE && MMIO32_BASE + MMIO32_SIZE <= ECAM_BASE);
    assert!(ECAM_BASE + ECAM_SIZE <= crate::irq::ioapic::IOAPIC_BASE);
    assert!(crate::irq::ioapic::IOAPIC_BASE < PCI_HOLE_END);
};

/// The number of slots on the bus. Slot 0 is the host bridge.
pub const SLOT_COUNT: usize = 32;

/// A device on the bus. Called under its lock, from vCPU threads.
pub trait PciDevice: Send {
    /// Reads its configuration space. `offset + data.len()` is at most 4096.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// Writes its configuration space; bounds as above.
    fn config_write(&mut self, offset: u16, data: &[u8]);

    /// The BARs that answer now: none while memory decoding is off.
    fn bars(&self) -> Vec<BarRange>;

    /// Reads within BAR `index`; the access lies within the BAR.
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]);

    /// Writes within BAR `index`; the access lies within the BAR.
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]);
}
