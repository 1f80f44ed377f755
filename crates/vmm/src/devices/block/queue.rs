//! What the guest asks: descriptor chains parsed into requests. No files and no KVM in here.
//!
//! Source: VIRTIO 1.3, 5.2.6 (device operation) and 2.7 (split virtqueues).

use clone_disk::{Buffer, Buffers, Request};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::state::{MAX_ZERO_SECTORS, QUEUE_SIZE, SEG_MAX, SIZE_MAX};
use super::{DEVICE, SECTOR};
use crate::virtio::{DeviceError, GuestRam};

/// The header of every request: type, reserved, sector.
const HEADER_BYTES: u64 = 16;
/// A range to discard or to zero: sector, number of sectors, flags.
const RANGE_BYTES: u64 = 16;
/// The flag of a range that allows giving its space back.
const FLAG_UNMAP: u32 = 1;

/// A chain, understood.
pub(super) struct Parsed {
    /// The chain's head, for the used ring.
    pub(super) head: u16,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// What is asked.
    pub(super) ask: Ask,
    /// Bytes that the device writes if it succeeds, with the status byte.
    pub(super) written: u32,
}

/// What a chain asks.
pub(super) enum Ask {
    /// Something of the disk.
    Disk(Request),
    /// The id string, into this memory.
    Id(Pieces),
    /// Something that is answered at once with this status.
    Refuse(u32),
}

/// Guest memory, as addresses and lengths in order.
#[derive(Default)]
pub(super) struct Pieces(Vec<(GuestAddress, u32)>);

impl Pieces {
    fn len(&self) -> u64 {
        self.0.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// Whether the data of a request keeps to the limits that the configuration space names.
    fn is_within_limits(&self) -> bool {
        self.0.len() <= SEG_MAX as usize && self.0.iter().all(|(_, len)| *len <= SIZE_MAX)
    }

    /// Cuts off all after the first `len` bytes, and returns it.
    fn split_off(&mut self, mut len: u64) -> Self {
        for index in 0..self.0.len() {
            let (address, size) = self.0[index];
            if len < u64::from(size) {
                let mut rest = self.0.split_off(index);
                // Less than `size`, which is 32 bits.
                let kept = len as u32;
                if kept > 0 {
                    self.0.push((address, kept));
                }
                rest[0] = (GuestAddress(address.0.wrapping_add(len)), size - kept);
                return Self(rest);
            }
            len -= u64::from(size);
        }
        Self::default()
    }

    /// Reads as much as fits into `bytes`.
    fn read(&self, ram: &GuestRam, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let mut rest = bytes;
        for (address, len) in &self.0 {
            let (part, after) = rest.split_at_mut(rest.len().min(*len as usize));
            ram.read_slice(part, *address)
                .map_err(|_| outside(*address))?;
            rest = after;
        }
        Ok(())
    }

    /// Writes `bytes` as far as they fit.
    pub(super) fn write(&self, ram: &GuestRam, bytes: &[u8]) -> Result<(), DeviceError> {
        let mut rest = bytes;
        for (address, len) in &self.0 {
            let (part, after) = rest.split_at(rest.len().min(*len as usize));
            ram.write_slice(part, *address)
                .map_err(|_| outside(*address))?;
            rest = after;
        }
        Ok(())
    }

    /// The host's view of it.
    fn buffers(&self, ram: &GuestRam) -> Result<Buffers, DeviceError> {
        let mut buffers = Buffers::default();
        for (address, len) in &self.0 {
            for slice in GuestMemoryBackend::get_slices(ram, *address, *len as usize) {
                let slice = slice.map_err(|_| outside(*address))?;
                // SAFETY: the device keeps its handle on the RAM until every request is over, and
                // RAM is never a Rust reference.
                buffers.push(unsafe { Buffer::new(slice.ptr_guard_mut().as_ptr(), slice.len()) });
            }
        }
        Ok(buffers)
    }
}

/// Understands a chain.
///
/// # Errors
/// [`DeviceError::Driver`] where it is not a request at all: then the device must stop.
pub(super) fn parse(
    chain: DescriptorChain<&GuestRam>,
    ram: &GuestRam,
) -> Result<Parsed, DeviceError> {
    let head = chain.head_index();
    let (mut readable, mut writable) = collect(chain)?;
    let data_out = readable.split_off(HEADER_BYTES);
    if readable.len() < HEADER_BYTES {
        return Err(DEVICE.driver_error("a request without a whole header"));
    }
    let Some(data_in_len) = writable.len().checked_sub(1) else {
        return Err(DEVICE.driver_error("a request without room for its status"));
    };
    let status = writable.split_off(data_in_len).0[0].0;
    // A status that cannot be written must not be found out when the request is over.
    if !GuestMemoryBackend::address_in_range(ram, status) {
        return Err(outside(status));
    }
    let mut header = [0; HEADER_BYTES as usize];
    readable.read(ram, &mut header)?;
    let kind = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    let mut written = 1;
    let ask = match kind {
        VIRTIO_BLK_T_IN => {
            written += data_in_len;
            transfer(sector, &writable, ram, |offset, buffers| Request::Read {
                offset,
                buffers,
            })?
        }
        VIRTIO_BLK_T_OUT => transfer(sector, &data_out, ram, |offset, buffers| Request::Write {
            offset,
            buffers,
        })?,
        VIRTIO_BLK_T_FLUSH => Ask::Disk(Request::Flush),
        VIRTIO_BLK_T_GET_ID => {
            written += data_in_len.min(super::state::ID_BYTES as u64);
            Ask::Id(writable)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => zero(kind, &data_out, ram)?,
        _ => Ask::Refuse(VIRTIO_BLK_S_UNSUPP),
    };
    Ok(Parsed {
        head,
        status,
        ask,
        // A chain is at most 2^32 - 1 bytes long, as the queue code makes sure.
        written: u32::try_from(written).unwrap_or(u32::MAX),
    })
}

/// The memory that the device may read, and that it may write.
fn collect(chain: DescriptorChain<&GuestRam>) -> Result<(Pieces, Pieces), DeviceError> {
    let (mut readable, mut writable) = (Pieces::default(), Pieces::default());
    let mut complete = false;
    for (count, descriptor) in chain.enumerate() {
        // Also bounds indirect tables, which may be longer than the queue.
        if count >= usize::from(QUEUE_SIZE) {
            return Err(DEVICE.driver_error("more segments than there may be"));
        }
        complete = !descriptor.has_next();
        if descriptor.len() == 0 {
            continue;
        }
        let pieces = if descriptor.is_write_only() {
            &mut writable
        } else {
            &mut readable
        };
        pieces.0.push((descriptor.addr(), descriptor.len()));
    }
    // The queue code ends a chain where it loops, leaves RAM or is otherwise broken.
    if !complete {
        return Err(DEVICE.driver_error("a chain that loops or leads nowhere"));
    }
    Ok((readable, writable))
}

fn transfer(
    sector: u64,
    data: &Pieces,
    ram: &GuestRam,
    request: impl FnOnce(u64, Buffers) -> Request,
) -> Result<Ask, DeviceError> {
    let buffers = data.buffers(ram)?;
    if !data.is_within_limits() {
        return Ok(Ask::Refuse(VIRTIO_BLK_S_IOERR));
    }
    let Some(offset) = sector.checked_mul(SECTOR) else {
        return Ok(Ask::Refuse(VIRTIO_BLK_S_IOERR));
    };
    if !data.len().is_multiple_of(SECTOR) {
        return Ok(Ask::Refuse(VIRTIO_BLK_S_IOERR));
    }
    Ok(Ask::Disk(request(offset, buffers)))
}

/// A discard or a zeroing; one range, as the configuration space allows.
fn zero(kind: u32, data: &Pieces, ram: &GuestRam) -> Result<Ask, DeviceError> {
    let mut range = [0; RANGE_BYTES as usize];
    if data.len() != RANGE_BYTES {
        return Ok(Ask::Refuse(VIRTIO_BLK_S_IOERR));
    }
    data.read(ram, &mut range)?;
    let (sector, count, flags) = (u64_at(&range, 0), u32_at(&range, 8), u32_at(&range, 12));
    let discard = kind == VIRTIO_BLK_T_DISCARD;
    let known = if discard { 0 } else { FLAG_UNMAP };
    if flags & !known != 0 {
        return Ok(Ask::Refuse(VIRTIO_BLK_S_UNSUPP));
    }
    let Some(offset) = sector.checked_mul(SECTOR) else {
        return Ok(Ask::Refuse(VIRTIO_BLK_S_IOERR));
    };
    if count > MAX_ZERO_SECTORS {
        return Ok(Ask::Refuse(VIRTIO_BLK_S_IOERR));
    }
    let len = u64::from(count) * SECTOR;
    Ok(Ask::Disk(if discard {
        Request::Discard { offset, len }
    } else {
        Request::WriteZeroes {
            offset,
            len,
            unmap: flags & FLAG_UNMAP != 0,
        }
    }))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

fn outside(address: GuestAddress) -> DeviceError {
    DEVICE.driver_error(format!("a buffer at {:#x} is outside of RAM", address.0))
}
