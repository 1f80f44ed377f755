//! The guest's requests: validated descriptor chains, parsed. This does not depend on files or KVM.
//!
//! Source: VIRTIO 1.3, 5.2.6 (device operation).

use clone_disk::{Buffer, Buffers, Request};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::GuestAddress;

use super::SECTOR;
use super::state::{MAX_ZERO_SECTORS, SEG_MAX, SIZE_MAX};
use crate::virtio::chain::Segment;
use crate::virtio::{DescriptorChain, DeviceError, Reader, ServedQueue, Writer};

/// The header of every request: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// A range to discard or to zero: sector, number of sectors, flags.
const RANGE_BYTES: usize = 16;
/// The flag of a range that allows releasing its space.
const FLAG_UNMAP: u32 = 1;

/// A parsed chain.
pub(super) struct Parsed<'c, 'm> {
    /// The address of the status byte, which lies in RAM.
    pub(super) status: GuestAddress,
    /// The request.
    pub(super) request: BlockRequest<'c, 'm>,
    /// The bytes that the device writes if the request succeeds, with the status byte.
    pub(super) written: u32,
}

/// The request of a chain.
pub(super) enum BlockRequest<'c, 'm> {
    /// A request for the disk.
    Disk(Request),
    /// The id string is to be written into this room.
    Id(Writer<'c, 'm>),
    /// A request that is answered at once with this status.
    Refuse(u32),
}

impl BlockRequest<'_, '_> {
    /// The bytes that count towards budgets and rate limits.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Disk(request) => request.data_len(),
            Self::Id(_) | Self::Refuse(_) => 0,
        }
    }
}

/// The data of a request: guest memory in order.
#[derive(Default)]
struct GuestIoVec<'m>(Vec<Segment<'m>>);

impl<'m> GuestIoVec<'m> {
    fn new(segments: impl Iterator<Item = Segment<'m>>) -> Self {
        Self(segments.collect())
    }

    fn len(&self) -> u64 {
        let lengths = self.0.iter().map(|segment| segment.slice.len() as u64);
        lengths.sum()
    }

    /// Whether the data keeps to the limits that the configuration space names.
    fn is_within_limits(&self) -> bool {
        let fits = |segment: &Segment<'_>| segment.slice.len() <= SIZE_MAX as usize;
        self.0.len() <= SEG_MAX as usize && self.0.iter().all(fits)
    }

    /// The host's view of the memory.
    fn buffers(&self) -> Buffers {
        let mut buffers = Buffers::default();
        for Segment { slice, .. } in &self.0 {
            // SAFETY: the device keeps its handle on the RAM until every request is over, and RAM
            // is never a Rust reference.
            buffers.push(unsafe { Buffer::new(slice.ptr_guard_mut().as_ptr(), slice.len()) });
        }
        buffers
    }
}

/// Parses a chain.
///
/// # Errors
/// [`DeviceError::Driver`] where the chain is not a request at all: then the device must stop.
pub(super) fn parse<'c, 'm>(
    queue: &ServedQueue,
    chain: &'c DescriptorChain<'m>,
) -> Result<Parsed<'c, 'm>, DeviceError> {
    let mut data_out = chain.reader();
    let Ok(header) = data_out.read_array::<HEADER_BYTES>() else {
        return Err(queue.driver_error("a request has no complete header"));
    };
    let no_status = || queue.driver_error("a request has no room for its status");
    let data_in_len = chain.writable_len().checked_sub(1).ok_or_else(no_status)?;
    let (data_in, status) = chain
        .writer()
        .split_at(data_in_len)
        .map_err(|_| no_status())?;
    let status = status.address().ok_or_else(no_status)?;
    let sector = u64_at(&header, 8);
    let mut written = 1;
    let request = match u32_at(&header, 0) {
        VIRTIO_BLK_T_IN => {
            written += data_in_len;
            let data = GuestIoVec::new(data_in.segments());
            transfer(sector, &data, |offset, buffers| Request::Read {
                offset,
                buffers,
            })
        }
        VIRTIO_BLK_T_OUT => {
            let data = GuestIoVec::new(data_out.segments());
            transfer(sector, &data, |offset, buffers| Request::Write {
                offset,
                buffers,
            })
        }
        VIRTIO_BLK_T_FLUSH => BlockRequest::Disk(Request::Flush),
        VIRTIO_BLK_T_GET_ID => {
            written += data_in_len.min(super::state::ID_BYTES);
            BlockRequest::Id(data_in)
        }
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => zero(kind, data_out),
        _ => BlockRequest::Refuse(VIRTIO_BLK_S_UNSUPP),
    };
    Ok(Parsed {
        status,
        request,
        // A chain has at most 2^32 - 1 bytes, as its type guarantees.
        written: u32::try_from(written).unwrap_or(u32::MAX),
    })
}

fn transfer(
    sector: u64,
    data: &GuestIoVec<'_>,
    request: impl FnOnce(u64, Buffers) -> Request,
) -> BlockRequest<'static, 'static> {
    let offset = sector.checked_mul(SECTOR);
    match offset.filter(|_| data.is_within_limits() && data.len().is_multiple_of(SECTOR)) {
        Some(offset) => BlockRequest::Disk(request(offset, data.buffers())),
        None => BlockRequest::Refuse(VIRTIO_BLK_S_IOERR),
    }
}

/// A discard or a zeroing of one range, as the configuration space allows.
fn zero(kind: u32, mut data: Reader<'_, '_>) -> BlockRequest<'static, 'static> {
    if data.remaining() != RANGE_BYTES {
        return BlockRequest::Refuse(VIRTIO_BLK_S_IOERR);
    }
    let Ok(range) = data.read_array::<RANGE_BYTES>() else {
        return BlockRequest::Refuse(VIRTIO_BLK_S_IOERR);
    };
    let (sector, count, flags) = (u64_at(&range, 0), u32_at(&range, 8), u32_at(&range, 12));
    let discard = kind == VIRTIO_BLK_T_DISCARD;
    let known = if discard { 0 } else { FLAG_UNMAP };
    if flags & !known != 0 {
        return BlockRequest::Refuse(VIRTIO_BLK_S_UNSUPP);
    }
    let Some(offset) = sector.checked_mul(SECTOR) else {
        return BlockRequest::Refuse(VIRTIO_BLK_S_IOERR);
    };
    if count > MAX_ZERO_SECTORS {
        return BlockRequest::Refuse(VIRTIO_BLK_S_IOERR);
    }
    let len = u64::from(count) * SECTOR;
    BlockRequest::Disk(if discard {
        Request::Discard { offset, len }
    } else {
        Request::WriteZeroes {
            offset,
            len,
            unmap: flags & FLAG_UNMAP != 0,
        }
    })
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
