//! Guest buffers as the kernel takes them: descriptor chains turned into lists for `readv` and
//! `writev`, so that frames move between the tap and guest RAM without a copy of ours.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryBackend, VolatileSlice};

use crate::virtio::GuestRam;

/// The most segments of one list. The kernel takes 1,024 (`UIO_MAXIOV`); one is kept for the
/// host's own tail. A Linux driver uses at most 19 for a frame.
const MAX_SEGMENTS: usize = 1023;

/// Which way a chain's buffers go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The device reads them (transmit).
    FromGuest,
    /// The device writes them (receive).
    ToGuest,
}

/// How a chain breaks the rules.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChainError {
    #[error("a descriptor chain loops or leaves its table")]
    Endless,
    #[error("a buffer of {len} bytes at {address:#x} is not all in RAM")]
    OutsideRam { address: u64, len: u32 },
    #[error("a buffer has the wrong direction for its queue")]
    Direction,
    #[error("a descriptor chain has more than {MAX_SEGMENTS} buffers")]
    TooLong,
}

/// A list of guest buffers. Its segments point into RAM that outlives it.
pub(super) struct Scatter<'ram> {
    ram: &'ram GuestRam,
    slices: Vec<VolatileSlice<'ram>>,
    /// The same as `slices`, in the kernel's form.
    iovecs: Vec<libc::iovec>,
    len: usize,
}

impl<'ram> Scatter<'ram> {
    /// An empty list; one serves many frames.
    pub(super) fn new(ram: &'ram GuestRam) -> Self {
        Self {
            ram,
            slices: Vec::with_capacity(32),
            iovecs: Vec::with_capacity(32),
            len: 0,
        }
    }

    /// The RAM that the segments point into.
    pub(super) fn ram(&self) -> &'ram GuestRam {
        self.ram
    }

    /// Bytes in the list.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Forgets the segments, keeps the room.
    pub(super) fn clear(&mut self) {
        self.slices.clear();
        self.iovecs.clear();
        self.len = 0;
    }

    /// Appends the buffers of `chain` and returns how many bytes they hold.
    pub(super) fn push_chain(
        &mut self,
        mut chain: DescriptorChain<&GuestRam>,
        direction: Direction,
    ) -> Result<usize, ChainError> {
        let before = self.len;
        // The iterator ends silently where it cannot go on: only a last descriptor without
        // "next" is a proper end.
        let mut ended = false;
        for descriptor in chain.by_ref() {
            if descriptor.is_write_only() != (direction == Direction::ToGuest) {
                return Err(ChainError::Direction);
            }
            ended = !descriptor.has_next();
            let outside = || ChainError::OutsideRam {
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            for slice in self
                .ram
                .get_slices(descriptor.addr(), descriptor.len() as usize)
            {
                if self.slices.len() == MAX_SEGMENTS {
                    return Err(ChainError::TooLong);
                }
                self.push(slice.map_err(|_| outside())?);
            }
        }
        if !ended {
            return Err(ChainError::Endless);
        }
        Ok(self.len - before)
    }

    fn push(&mut self, slice: VolatileSlice<'ram>) {
        self.iovecs.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
        self.len += slice.len();
        self.slices.push(slice);
    }

    /// Copies `bytes` into the list at `offset`; what does not fit is left out.
    pub(super) fn write_at(&self, mut offset: usize, mut bytes: &[u8]) {
        for slice in &self.slices {
            if bytes.is_empty() {
                return;
            }
            if offset >= slice.len() {
                offset -= slice.len();
                continue;
            }
            let part = bytes.len().min(slice.len() - offset);
            // Cannot fail: `offset + part` is within the slice.
            let written = slice.write(&bytes[..part], offset).unwrap_or(0);
            bytes = &bytes[written..];
            offset = 0;
        }
    }

    /// Reads one frame from `file` into the list, and what it has more into `tail`. Returns the
    /// bytes read.
    pub(super) fn read_frame(&mut self, file: &File, tail: &mut [u8]) -> io::Result<usize> {
        self.iovecs.push(libc::iovec {
            iov_base: tail.as_mut_ptr().cast(),
            iov_len: tail.len(),
        });
        // SAFETY: every segment but the last lies in guest RAM, which stays mapped for `'ram` and
        // which no Rust reference covers (the guest writes it too); the last is `tail`, borrowed
        // mutably for this call. Their number is at most MAX_SEGMENTS + 1.
        let read = unsafe {
            libc::readv(
                file.as_raw_fd(),
                self.iovecs.as_ptr(),
                self.iovecs.len() as libc::c_int,
            )
        };
        self.iovecs.pop();
        byte_count(read)
    }

    /// Writes the list to `file` as one frame. Returns the bytes written.
    pub(super) fn write_frame(&self, file: &File) -> io::Result<usize> {
        // SAFETY: every segment lies in guest RAM, which stays mapped for `'ram`; the kernel only
        // reads them. Their number is at most MAX_SEGMENTS.
        let written = unsafe {
            libc::writev(
                file.as_raw_fd(),
                self.iovecs.as_ptr(),
                self.iovecs.len() as libc::c_int,
            )
        };
        byte_count(written)
    }
}

fn byte_count(returned: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}
