//! The machine's devices as AML: the PCI host bridge, the serial port, the power button, the
//! generation id, and the event device that tells the guest about the last two.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::{Aml, AmlSink, sdt::Sdt};

use super::power::{EVENT_GENERATION, EVENT_PORT, EVENT_POWER_BUTTON};
use super::{EVENT_PIN, SERIAL_PIN};
use crate::boot::VMGENID_ADDRESS;
use crate::devices::serial::{COM1_PORT, PORT_COUNT};
use crate::pci::{ECAM_BASE, ECAM_SIZE, MMIO32_BASE, MMIO32_SIZE};

/// The notification of a pressed button, and of a changed generation id.
const NOTIFY_CHANGED: u8 = 0x80;

pub(super) fn dsdt() -> Sdt {
    let mut blocks = Vec::new();
    host_bridge(&mut blocks);
    serial_port(&mut blocks);
    power_button(&mut blocks);
    generation_id(&mut blocks);
    event_device(&mut blocks);
    poweroff(&mut blocks);
    let mut dsdt = super::empty_dsdt();
    dsdt.append_slice(&blocks);
    dsdt
}

/// A term in its encoded form, which has no borrowed parts.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn encode(term: &dyn Aml) -> Encoded {
    let mut bytes = Vec::new();
    term.to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

fn host_bridge(blocks: &mut Vec<u8>) {
    let window_end = (MMIO32_BASE + MMIO32_SIZE - 1) as u32;
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "PCI0".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                    &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                    &Name::new("_SEG".into(), &0u8),
                    &Name::new("_BBN".into(), &0u8),
                    &Name::new("_UID".into(), &0u8),
                    &Name::new("_CCA".into(), &1u8),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &AddressSpace::new_bus_number(0u16, 0u16),
                            &AddressSpace::new_memory(
                                AddressSpaceCacheable::NotCacheable,
                                true,
                                MMIO32_BASE as u32,
                                window_end,
                                None,
                            ),
                        ]),
                    ),
                ],
            ),
            // The ECAM window belongs to the board, or Linux would not trust it.
            &Device::new(
                "MBRD".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                    &Name::new("_UID".into(), &0u8),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(
                            true,
                            ECAM_BASE as u32,
                            ECAM_SIZE as u32,
                        )]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(blocks);
}

fn serial_port(blocks: &mut Vec<u8>) {
    let resources = encode(&ResourceTemplate::new(vec![
        &IO::new(COM1_PORT, COM1_PORT, 1, PORT_COUNT as u8),
        &edge(SERIAL_PIN),
    ]));
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &resources),
            ],
        )],
    )
    .to_aml_bytes(blocks);
}

/// An edge-triggered, active-high interrupt of the I/O APIC.
fn edge(pin: usize) -> Interrupt {
    Interrupt::new(true, true, false, false, pin as u32)
}

fn power_button(blocks: &mut Vec<u8>) {
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PWRB".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                &Name::new("_UID".into(), &0u8),
            ],
        )],
    )
    .to_aml_bytes(blocks);
}

fn generation_id(blocks: &mut Vec<u8>) {
    let (low, high) = (VMGENID_ADDRESS as u32, (VMGENID_ADDRESS >> 32) as u32);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"CLON0001"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
            ],
        )],
    )
    .to_aml_bytes(blocks);
}

/// `_EVT` reads the register of pending events, which clears it, and notifies each device.
fn event_device(blocks: &mut Vec<u8>) {
    let resources = encode(&ResourceTemplate::new(vec![&edge(EVENT_PIN)]));
    let registers = Field::new(
        "EVTS".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"PEND", 8)],
    );
    let (pending, button, generation) = (
        Path::new("PEND"),
        Path::new("\\_SB_.PWRB"),
        Path::new("\\_SB_.VGEN"),
    );
    let pass_on = encode(&Method::new(
        "_EVT".into(),
        1,
        true,
        vec![
            &Store::new(&Local(0), &pending),
            &And::new(&Local(1), &Local(0), &EVENT_POWER_BUTTON),
            &If::new(&Local(1), vec![&Notify::new(&button, &NOTIFY_CHANGED)]),
            &And::new(&Local(1), &Local(0), &EVENT_GENERATION),
            &If::new(&Local(1), vec![&Notify::new(&generation, &NOTIFY_CHANGED)]),
        ],
    ));
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &resources),
                &OpRegion::new("EVTS".into(), OpRegionSpace::SystemIO, &EVENT_PORT, &1u8),
                &registers,
                &pass_on,
            ],
        )],
    )
    .to_aml_bytes(blocks);
}

/// `\_S5`: the value of the sleep control register that powers the machine off.
fn poweroff(blocks: &mut Vec<u8>) {
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&super::power::SLEEP_TYPE_OFF]),
    )
    .to_aml_bytes(blocks);
}
