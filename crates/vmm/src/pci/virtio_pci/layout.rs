//! The layout of the configuration space and of the BAR.

use crate::pci::ConfigSpace;
use crate::pci::Identity;
use crate::pci::msix::ENTRY_SIZE;

pub(super) const BAR_SIZE: u32 = 0x1_0000;
const COMMON_OFFSET: u64 = 0x0000;
const ISR_OFFSET: u64 = 0x1000;
const DEVICE_OFFSET: u64 = 0x2000;
pub(super) const NOTIFY_OFFSET: u64 = 0x3000;
/// The bytes between the doorbells of two queues.
pub(super) const NOTIFY_STRIDE: u64 = 4;
const MSIX_TABLE_OFFSET: u64 = 0x8000;
const MSIX_PENDING_OFFSET: u64 = 0xC000;
const REGION_SIZE: u64 = 0x1000;
const MSIX_TABLE_SIZE: u64 = 2048 * ENTRY_SIZE / 2;

const VENDOR_VIRTIO: u16 = 0x1AF4;
/// PCI device ids of virtio 1.x devices start here (4.1.2.1).
const DEVICE_ID_BASE: u16 = 0x1040;

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// A part of the BAR, with the offset within it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Region {
    Common(u64),
    Isr,
    Device(u64),
    Notify(u64),
    MsixTable(u64),
    MsixPending(u64),
    Nothing,
}

/// The part of the BAR that `offset` lies in.
pub(super) fn region(offset: u64) -> Region {
    let within = |start: u64, size: u64| offset.checked_sub(start).filter(|at| *at < size);
    if let Some(at) = within(COMMON_OFFSET, REGION_SIZE) {
        Region::Common(at)
    } else if within(ISR_OFFSET, REGION_SIZE).is_some() {
        Region::Isr
    } else if let Some(at) = within(DEVICE_OFFSET, REGION_SIZE) {
        Region::Device(at)
    } else if let Some(at) = within(NOTIFY_OFFSET, REGION_SIZE) {
        Region::Notify(at)
    } else if let Some(at) = within(MSIX_TABLE_OFFSET, MSIX_TABLE_SIZE) {
        Region::MsixTable(at)
    } else if let Some(at) = within(MSIX_PENDING_OFFSET, REGION_SIZE) {
        Region::MsixPending(at)
    } else {
        Region::Nothing
    }
}

/// The offsets of the capabilities whose registers the guest's writes change.
pub(super) struct Capabilities {
    msix: usize,
    window: usize,
}

impl Capabilities {
    pub(super) fn msix_control(&self) -> u16 {
        self.msix as u16 + 2
    }

    pub(super) fn touches_msix_control(&self, offset: u16, len: usize) -> bool {
        let (start, end) = (usize::from(offset), usize::from(offset) + len);
        let control = usize::from(self.msix_control());
        start < control + 2 && control < end
    }

    /// Whether `offset` is the data register of the configuration access capability.
    pub(super) fn is_window_data(&self, offset: u16) -> bool {
        usize::from(offset) == self.window + 16
    }

    /// The offset and length in the BAR that the guest has set in that capability, where they are
    /// as the specification demands.
    pub(super) fn window(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let mut fields = [0; 12];
        config.read(self.window as u16 + 4, &mut fields);
        let word = |at: usize| {
            u32::from_le_bytes([fields[at], fields[at + 1], fields[at + 2], fields[at + 3]])
        };
        let (bar, offset, len) = (fields[0], word(4), word(8));
        let fits = offset.checked_add(len).is_some_and(|end| end <= BAR_SIZE);
        let valid =
            bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len.max(1)) && fits;
        valid.then_some((u64::from(offset), len as usize))
    }
}

/// The configuration space of a device of `device_type` with its BAR at `bar_address`.
pub(super) fn configuration(
    device_type: u32,
    bar_address: u32,
    queues: u16,
    msix_control: u16,
) -> (ConfigSpace, Capabilities) {
    let device_type = device_type as u16;
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR_VIRTIO,
        device: DEVICE_ID_BASE + device_type,
        subsystem_vendor: VENDOR_VIRTIO,
        subsystem: DEVICE_ID_BASE + device_type,
        class: class_code(device_type),
        revision: 1,
    });
    config.add_bar(0, bar_address, BAR_SIZE);
    config.add_capability(
        CAP_VENDOR,
        &virtio_capability(CFG_COMMON, COMMON_OFFSET, 0x38),
    );
    config.add_capability(CAP_VENDOR, &virtio_capability(CFG_ISR, ISR_OFFSET, 1));
    config.add_capability(
        CAP_VENDOR,
        &virtio_capability(CFG_DEVICE, DEVICE_OFFSET, 0x1000),
    );
    let doorbells = u32::from(queues) * NOTIFY_STRIDE as u32;
    let mut notify = virtio_capability(CFG_NOTIFY, NOTIFY_OFFSET, doorbells);
    notify[0] += 4;
    notify.extend_from_slice(&(NOTIFY_STRIDE as u32).to_le_bytes());
    config.add_capability(CAP_VENDOR, &notify);
    let mut window = virtio_capability(CFG_PCI, 0, 0);
    window[0] += 4;
    window.extend_from_slice(&[0; 4]);
    let window = config.add_capability(CAP_VENDOR, &window);
    // The guest sets the window's BAR, offset and length, and writes its data.
    config.allow_writes(window + 4, &[0xFF]);
    config.allow_writes(window + 8, &[0xFF; 12]);
    let mut msix = msix_control.to_le_bytes().to_vec();
    // Both live in BAR 0, whose index is in the low three bits.
    msix.extend_from_slice(&(MSIX_TABLE_OFFSET as u32).to_le_bytes());
    msix.extend_from_slice(&(MSIX_PENDING_OFFSET as u32).to_le_bytes());
    let msix = config.add_capability(CAP_MSIX, &msix);
    config.allow_writes(msix + 2, &[0, 0xC0]);
    (config, Capabilities { msix, window })
}

/// `struct virtio_pci_cap` (4.1.4) after its id and link.
fn virtio_capability(kind: u8, offset: u64, length: u32) -> Vec<u8> {
    // cap_len counts the id and the link too; BAR 0; id 0; padding.
    let mut body = vec![16, kind, 0, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    body
}

/// The PCI class code, by which `lspci` and drivers' policies identify the device.
fn class_code(device_type: u16) -> u32 {
    match device_type {
        1 => 0x02_00_00,
        2 => 0x01_80_00,
        3 => 0x07_80_00,
        _ => 0xFF_00_00,
    }
}
