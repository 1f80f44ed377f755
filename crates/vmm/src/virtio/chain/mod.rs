//! The buffers of one request: a descriptor chain, validated as a whole before a device sees it.
//!
//! The guest writes the descriptors, so they are hostile. [`DescriptorChain`] holds only chains
//! that end, have at most [`MAX_DESCRIPTORS`] descriptors and 2^32 - 1 bytes, keep the order of the
//! specification (device-readable buffers before device-writable ones, 2.7.4.2) and lie in RAM. A
//! device reaches the bytes through a [`Reader`] and a [`Writer`], neither of which can leave its
//! part of the chain. The meaning of the bytes is left to the device.

use virtio_queue::DescriptorChain as RawChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestRam;

/// The most descriptors in one chain. The kernel takes 1,024 buffers in one call (`UIO_MAXIOV`),
/// and the network device adds one of its own.
pub const MAX_DESCRIPTORS: usize = 1023;

/// How a chain breaks the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The chain loops, leaves its table or has more than 2^32 - 1 bytes.
    #[error("descriptor chain {head} has no end")]
    Endless {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A buffer does not lie in RAM.
    #[error("a buffer of {len} bytes at {address:#x} is not in RAM")]
    OutsideRam {
        /// The buffer's guest-physical address.
        address: u64,
        /// The buffer's length in bytes.
        len: u32,
    },
    /// The chain has too many descriptors.
    #[error("a descriptor chain has more than {MAX_DESCRIPTORS} buffers")]
    TooMany,
}

/// The buffers hold, or take, fewer bytes than the device needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the buffers are too short")]
pub struct ShortBuffer;

/// A part of one descriptor's buffer that is contiguous in host memory. It is never empty.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'m> {
    /// The guest-physical address of the first byte.
    pub address: GuestAddress,
    /// The memory.
    pub slice: VolatileSlice<'m, ()>,
}

/// A validated request. One value serves many requests: its list of segments keeps its room.
#[derive(Debug)]
pub struct DescriptorChain<'m> {
    head: u16,
    /// The readable segments, and then the writable ones.
    segments: Vec<Segment<'m>>,
    readable_segments: usize,
    readable_len: usize,
    writable_len: usize,
    /// Whether a writable buffer was seen, which may be an empty one.
    has_writable: bool,
}

impl<'m> DescriptorChain<'m> {
    /// A chain without buffers, to be filled by
    /// [`ServedQueue::pop_into`](super::ServedQueue::pop_into).
    pub fn new() -> Self {
        Self {
            head: 0,
            segments: Vec::with_capacity(20),
            readable_segments: 0,
            readable_len: 0,
            writable_len: 0,
            has_writable: false,
        }
    }

    /// The number of the chain's first descriptor, by which the used ring names the chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The bytes that the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// The bytes that the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// The bytes that the driver wrote.
    pub fn reader(&self) -> Reader<'_, 'm> {
        let segments = &self.segments[..self.readable_segments];
        Reader(Span::new(segments, self.readable_len))
    }

    /// The room for the device's bytes. Call it once: two writers would write the same room.
    pub fn writer(&self) -> Writer<'_, 'm> {
        let segments = &self.segments[self.readable_segments..];
        Writer(Span::new(segments, self.writable_len))
    }

    /// Replaces the content by the buffers of `chain`. After an error the content is of no use.
    pub(super) fn load(
        &mut self,
        ram: &'m GuestRam,
        chain: RawChain<&GuestRam>,
    ) -> Result<(), ChainError> {
        self.clear(chain.head_index());
        // The raw iterator stops without an error at loops, bad indices, bad indirect tables and
        // a total of 2^32 bytes, so only a last descriptor without "next" is a proper end.
        let mut ended = false;
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(ChainError::TooMany);
            }
            self.push(ram, &descriptor)?;
            ended = !descriptor.has_next();
        }
        match ended {
            true => Ok(()),
            false => Err(ChainError::Endless { head: self.head }),
        }
    }

    fn clear(&mut self, head: u16) {
        self.head = head;
        self.segments.clear();
        self.readable_segments = 0;
        self.readable_len = 0;
        self.writable_len = 0;
        self.has_writable = false;
    }

    fn push(&mut self, ram: &'m GuestRam, descriptor: &Descriptor) -> Result<(), ChainError> {
        let len = descriptor.len() as usize;
        if descriptor.is_write_only() {
            self.push_segments(ram, descriptor)?;
            self.writable_len += len;
            self.has_writable = true;
        } else {
            if self.has_writable {
                return Err(ChainError::Order);
            }
            self.push_segments(ram, descriptor)?;
            self.readable_segments = self.segments.len();
            self.readable_len += len;
        }
        Ok(())
    }

    fn push_segments(
        &mut self,
        ram: &'m GuestRam,
        descriptor: &Descriptor,
    ) -> Result<(), ChainError> {
        let (mut address, len) = (descriptor.addr(), descriptor.len());
        // Nearly every buffer lies in one region of RAM, and is found by one look.
        if let Ok(slice) = ram.get_slice(address, len as usize) {
            return self.push_segment(Segment { address, slice });
        }
        for slice in GuestMemoryBackend::get_slices(ram, address, len as usize) {
            let slice = slice.map_err(|_| ChainError::OutsideRam {
                address: descriptor.addr().0,
                len,
            })?;
            self.push_segment(Segment { address, slice })?;
            address = GuestAddress(address.0 + slice.len() as u64);
        }
        Ok(())
    }

    /// Adds a segment. A buffer that crosses from one region of RAM into the next has several.
    fn push_segment(&mut self, segment: Segment<'m>) -> Result<(), ChainError> {
        if segment.slice.is_empty() {
            return Ok(());
        }
        if self.segments.len() == MAX_DESCRIPTORS {
            return Err(ChainError::TooMany);
        }
        self.segments.push(segment);
        Ok(())
    }
}

impl Default for DescriptorChain<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads a chain's device-readable bytes in order, and never past their end.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'c, 'm>(Span<'c, 'm>);

impl<'c, 'm> Reader<'c, 'm> {
    /// The bytes that are left.
    pub fn remaining(&self) -> usize {
        self.0.len
    }

    /// Fills `bytes` from the front.
    ///
    /// # Errors
    /// [`ShortBuffer`] where fewer bytes are left; nothing is read then.
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), ShortBuffer> {
        let (front, rest) = self.0.split_at(bytes.len())?;
        let mut done = 0;
        for segment in front.segments() {
            let end = done + segment.slice.len();
            segment.slice.copy_to(&mut bytes[done..end]);
            done = end;
        }
        self.0 = rest;
        Ok(())
    }

    /// Reads the next `N` bytes.
    ///
    /// # Errors
    /// [`ShortBuffer`] where fewer bytes are left; nothing is read then.
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], ShortBuffer> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// A reader of the next `len` bytes alone.
    ///
    /// # Errors
    /// [`ShortBuffer`] where fewer bytes are left.
    pub fn take(self, len: usize) -> Result<Self, ShortBuffer> {
        Ok(Self(self.0.split_at(len)?.0))
    }

    /// The memory that is left, in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'m>> + use<'c, 'm> {
        self.0.segments()
    }
}

/// Writes a chain's device-writable room in order, and never past its end.
#[derive(Debug)]
pub struct Writer<'c, 'm>(Span<'c, 'm>);

impl<'c, 'm> Writer<'c, 'm> {
    /// The bytes of room that are left.
    pub fn remaining(&self) -> usize {
        self.0.len
    }

    /// Writes `bytes` at the front.
    ///
    /// # Errors
    /// [`ShortBuffer`] where less room is left; nothing is written then.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), ShortBuffer> {
        let (front, rest) = self.0.split_at(bytes.len())?;
        let mut done = 0;
        for segment in front.segments() {
            let end = done + segment.slice.len();
            segment.slice.copy_from(&bytes[done..end]);
            done = end;
        }
        self.0 = rest;
        Ok(())
    }

    /// Two writers: one of the first `len` bytes of room, and one of the rest.
    ///
    /// # Errors
    /// [`ShortBuffer`] where less room is left.
    pub fn split_at(self, len: usize) -> Result<(Self, Self), ShortBuffer> {
        let (front, rest) = self.0.split_at(len)?;
        Ok((Self(front), Self(rest)))
    }

    /// The guest-physical address of the next byte of room.
    pub fn address(&self) -> Option<GuestAddress> {
        self.segments().next().map(|segment| segment.address)
    }

    /// The room that is left, in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'m>> + use<'c, 'm> {
        self.0.segments()
    }
}

/// A stretch of a chain's segments: `len` bytes that begin `offset` bytes into the first one.
#[derive(Clone, Copy, Debug)]
struct Span<'c, 'm> {
    segments: &'c [Segment<'m>],
    offset: usize,
    len: usize,
}

impl<'c, 'm> Span<'c, 'm> {
    fn new(segments: &'c [Segment<'m>], len: usize) -> Self {
        Self {
            segments,
            offset: 0,
            len,
        }
    }

    fn split_at(self, len: usize) -> Result<(Self, Self), ShortBuffer> {
        let rest = self.len.checked_sub(len).ok_or(ShortBuffer)?;
        let front = Self { len, ..self };
        let mut back = Self { len: rest, ..self };
        let mut skip = self.offset + len;
        while let Some((first, others)) = back.segments.split_first()
            && skip >= first.slice.len()
        {
            skip -= first.slice.len();
            back.segments = others;
        }
        back.offset = skip;
        Ok((front, back))
    }

    fn segments(self) -> impl Iterator<Item = Segment<'m>> + use<'c, 'm> {
        let (mut offset, mut left) = (self.offset, self.len);
        self.segments.iter().map_while(move |segment| {
            if left == 0 {
                return None;
            }
            // Most devices want most segments whole.
            if offset == 0 && segment.slice.len() <= left {
                left -= segment.slice.len();
                return Some(*segment);
            }
            let at = std::mem::take(&mut offset);
            let len = left.min(segment.slice.len() - at);
            left -= len;
            Some(Segment {
                address: GuestAddress(segment.address.0 + at as u64),
                slice: segment.slice.subslice(at, len).ok()?,
            })
        })
    }
}

#[cfg(test)]
mod tests;
