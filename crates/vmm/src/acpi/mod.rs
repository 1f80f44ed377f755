//! ACPI, hardware-reduced: the tables that describe the machine, and the few registers behind
//! them ([`power`]): poweroff, reset, and the events of the Generic Event Device (power button,
//! new VM generation).
//!
//! Source: ACPI Specification 6.5; "Virtual Machine Generation ID" (Microsoft, 2012).

mod dsdt;
pub mod power;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::{ACPI_TABLES, VMGENID_ADDRESS};
use crate::irq::ioapic::IOAPIC_BASE;
use crate::pci::ECAM_BASE;
use crate::virtio::GuestRam;

const OEM_ID: [u8; 6] = *b"CLONE ";
const OEM_TABLE_ID: [u8; 8] = *b"CLONEVM ";
const OEM_REVISION: u32 = 1;
const LAPIC_BASE: u32 = 0xFEE0_0000;
/// The guest must not probe for VGA or a CMOS clock. There is no 8042 either, whose bit stays clear
/// (FADT, IAPC_BOOT_ARCH).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// The I/O APIC pin of the Generic Event Device.
pub const EVENT_PIN: usize = 9;
/// The I/O APIC pin of the first serial port, as on a PC.
pub const SERIAL_PIN: usize = 4;

/// Writes all tables for `vcpus` CPUs into RAM; returns the address of the root pointer.
///
/// # Panics
/// Panics when the tables outgrow their place. Their size depends on the VMM alone.
pub fn write_tables(ram: &GuestRam, vcpus: u8) -> Result<u64, GuestMemoryError> {
    let mut writer = Writer {
        ram,
        next: ACPI_TABLES + Rsdp::len().next_multiple_of(16) as u64,
    };
    let dsdt = writer.put(&dsdt::dsdt())?;
    let tables = [
        writer.put(&fadt(dsdt))?,
        writer.put(&madt(vcpus))?,
        writer.put(&mcfg())?,
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = writer.put(&xsdt)?;
    writer.next = ACPI_TABLES;
    writer.put(&Rsdp::new(OEM_ID, xsdt))
}

struct Writer<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Writer<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, GuestMemoryError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = self.next;
        self.next = (at + bytes.len() as u64).next_multiple_of(16);
        assert!(
            self.next <= VMGENID_ADDRESS,
            "the ACPI tables fit below the generation id"
        );
        self.ram.write_slice(&bytes, GuestAddress(at))?;
        Ok(at)
    }
}

fn io_register(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // The buttons are devices of the DSDT, not fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = io_register(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = io_register(power::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = io_register(power::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let apic = LocalInterruptController::Address(LAPIC_BASE);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, apic);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_BASE as u32, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 0);
    mcfg
}

/// An empty DSDT, to which definition blocks are added.
fn empty_dsdt() -> Sdt {
    const HEADER_LEN: u32 = 36;
    Sdt::new(*b"DSDT", HEADER_LEN, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::ram;

    fn read<const N: usize>(ram: &GuestRam, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(read(ram, at + 4));
        let mut bytes = vec![0; len as usize];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn checksum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reachable_from_the_root_and_sums_to_zero() {
        let ram = ram(1 << 20);
        let rsdp = write_tables(&ram, 32).unwrap();
        assert_eq!(&read::<8>(&ram, rsdp), b"RSD PTR ");
        assert_eq!(checksum(&read::<36>(&ram, rsdp)), 0);
        let xsdt = table(&ram, u64::from_le_bytes(read(&ram, rsdp + 24)));
        assert_eq!(checksum(&xsdt), 0);
        let mut signatures = Vec::new();
        for entry in xsdt[36..].chunks_exact(8) {
            let bytes = table(&ram, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(checksum(&bytes), 0, "{:?}", &bytes[..4]);
            signatures.push(bytes[..4].to_vec());
        }
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = u64::from_le_bytes(xsdt[36..44].try_into().unwrap());
        let dsdt = table(&ram, u64::from_le_bytes(read(&ram, fadt + 140)));
        assert_eq!((&dsdt[..4], checksum(&dsdt)), (&b"DSDT"[..], 0));
    }

    #[test]
    fn the_madt_has_an_entry_per_cpu() {
        let mut bytes = Vec::new();
        madt(5).to_aml_bytes(&mut bytes);
        // 44 bytes of header, 8 per local APIC, 12 for the I/O APIC.
        assert_eq!(bytes.len(), 44 + 5 * 8 + 12);
    }
}
