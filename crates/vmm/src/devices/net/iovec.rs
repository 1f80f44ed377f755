//! Guest buffers in the kernel's form for `readv` and `writev`, so that frames move between the tap
//! and guest RAM without a copy of ours.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

use crate::virtio::chain::{ChainError, MAX_DESCRIPTORS, Segment};

/// A list of guest buffers. They lie in RAM that is mapped for `'ram`.
pub(super) struct IoVec<'ram> {
    buffers: Vec<libc::iovec>,
    len: usize,
    ram: PhantomData<Segment<'ram>>,
}

impl<'ram> IoVec<'ram> {
    /// An empty list; one serves many frames.
    pub(super) fn new() -> Self {
        Self {
            buffers: Vec::with_capacity(32),
            len: 0,
            ram: PhantomData,
        }
    }

    /// The bytes in the list.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Forgets the buffers and keeps the room for others.
    pub(super) fn clear(&mut self) {
        self.buffers.clear();
        self.len = 0;
    }

    /// Appends buffers, of which the kernel takes [`MAX_DESCRIPTORS`] and one for a frame's tail.
    pub(super) fn extend(
        &mut self,
        segments: impl Iterator<Item = Segment<'ram>>,
    ) -> Result<(), ChainError> {
        for Segment { slice, .. } in segments {
            if self.buffers.len() == MAX_DESCRIPTORS {
                return Err(ChainError::TooMany);
            }
            self.buffers.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            self.len += slice.len();
        }
        Ok(())
    }

    /// Reads one frame from `file` into the list, and what does not fit into `tail`. Returns the
    /// number of bytes read.
    pub(super) fn read_frame(&mut self, file: &File, tail: &mut [u8]) -> io::Result<usize> {
        self.buffers.push(libc::iovec {
            iov_base: tail.as_mut_ptr().cast(),
            iov_len: tail.len(),
        });
        // SAFETY: every buffer but the last lies in guest RAM, which stays mapped for `'ram` and
        // which no Rust reference covers (the guest writes it too); the last is `tail`, borrowed
        // mutably for this call. Their number is at most MAX_DESCRIPTORS + 1.
        let read = unsafe {
            libc::readv(
                file.as_raw_fd(),
                self.buffers.as_ptr(),
                self.buffers.len() as libc::c_int,
            )
        };
        self.buffers.pop();
        byte_count(read)
    }

    /// Writes the list to `file` as one frame. Returns the number of bytes written.
    pub(super) fn write_frame(&self, file: &File) -> io::Result<usize> {
        // SAFETY: every buffer lies in guest RAM, which stays mapped for `'ram`; the kernel only
        // reads them. Their number is at most MAX_DESCRIPTORS.
        let written = unsafe {
            libc::writev(
                file.as_raw_fd(),
                self.buffers.as_ptr(),
                self.buffers.len() as libc::c_int,
            )
        };
        byte_count(written)
    }
}

fn byte_count(returned: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}
