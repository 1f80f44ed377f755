//! Memory that a request reads into or writes from: guest RAM or a buffer of our own, as a pointer
//! and a length, because guest RAM may change under our eyes and must never be a Rust slice.

use std::io;

/// The most buffers that one system call takes (`IOV_MAX`).
pub(crate) const IOV_MAX: usize = 1024;

/// A contiguous piece of memory, laid out as the kernel's `struct iovec`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Buffer(libc::iovec);

// SAFETY: a buffer is only an address and a length; `Buffer::new` makes its caller promise that the
// memory may be used from any thread until the request is complete.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Describes `len` bytes at `address`.
    ///
    /// # Safety
    /// The memory must stay mapped, and writable where the request is a read, until the request
    /// that takes the buffer is complete (or the [`Disk`](crate::Disk) that took it is dropped,
    /// which waits). No Rust reference to it may be used meanwhile, but other writers are allowed.
    pub unsafe fn new(address: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: address.cast(),
            iov_len: len,
        })
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its first byte.
    pub(crate) fn address(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The part of `len` bytes at `start`.
    fn part(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.len(), "part of a buffer past its end");
        // Only an address is computed; it is inside the original by the check above.
        let address = self.address().wrapping_add(start);
        // SAFETY: inside the memory that the original was promised for, by the check above.
        unsafe { Self::new(address, len) }
    }

    fn fill_zero(&self) {
        // SAFETY: `Buffer::new` was promised memory that stays mapped until the request is
        // complete, and a buffer is filled only by the request that owns it.
        unsafe { std::ptr::write_bytes(self.address(), 0, self.len()) }
    }
}

/// The buffers of a request, in order.
#[derive(Clone, Default)]
pub struct Buffers(Vec<Buffer>);

impl From<Vec<Buffer>> for Buffers {
    fn from(buffers: Vec<Buffer>) -> Self {
        Self(buffers)
    }
}

impl Buffers {
    /// One buffer over a slice of ours.
    ///
    /// # Safety
    /// As for [`Buffer::new`]: the slice must outlive the request, untouched.
    pub(crate) unsafe fn of_slice(slice: &mut [u8]) -> Self {
        // SAFETY: passed on to our caller.
        Self(vec![unsafe {
            Buffer::new(slice.as_mut_ptr(), slice.len())
        }])
    }

    /// The total length in bytes.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|buffer| buffer.len() as u64).sum()
    }

    /// Whether there is not a byte in it.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Buffer::is_empty)
    }

    /// Appends a buffer.
    pub fn push(&mut self, buffer: Buffer) {
        self.0.push(buffer);
    }

    /// Appends all of `other`.
    pub(crate) fn extend(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }

    /// The buffers as the kernel takes them, no more than it takes at once.
    pub(crate) fn iovecs(&self) -> (*const libc::iovec, usize) {
        // `Buffer` is a transparent `iovec`.
        (self.0.as_ptr().cast(), self.0.len().min(IOV_MAX))
    }

    /// The single buffers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Buffer> {
        self.0.iter()
    }

    /// The bytes `[start, start + len)` of all buffers together.
    pub(crate) fn range(&self, mut start: u64, mut len: u64) -> Self {
        let mut parts = Vec::new();
        for buffer in &self.0 {
            if len == 0 {
                break;
            }
            let size = buffer.len() as u64;
            if start >= size {
                start -= size;
                continue;
            }
            let take = (size - start).min(len);
            // Both are at most this buffer's length, which is a `usize`.
            parts.push(buffer.part(start as usize, take as usize));
            start = 0;
            len -= take;
        }
        Self(parts)
    }

    /// Forgets the first `count` bytes, which are done.
    pub(crate) fn advance(&mut self, count: u64) {
        let len = self.len();
        *self = self.range(count, len.saturating_sub(count));
    }

    /// A copy of the bytes.
    #[cfg(test)]
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len() as usize];
        let mut rest = &mut bytes[..];
        for buffer in &self.0 {
            let (part, after) = rest.split_at_mut(buffer.len());
            // SAFETY: `Buffer::new` was promised memory that stays mapped; `part` is as long.
            unsafe {
                std::ptr::copy_nonoverlapping(buffer.address(), part.as_mut_ptr(), part.len())
            };
            rest = after;
        }
        bytes
    }

    /// Fills all of it with zeros.
    pub(crate) fn fill_zero(&self) {
        self.0.iter().for_each(Buffer::fill_zero);
    }
}

/// A buffer of ours that requests may use, freed with the request that owns it.
pub(crate) struct Owned(Box<[u8]>);

impl Owned {
    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self(vec![0; len].into_boxed_slice())
    }

    /// Takes over `bytes`.
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes.into_boxed_slice())
    }

    /// Describes all of it. The caller keeps `self` until the request is complete.
    pub(crate) fn buffers(&mut self) -> Buffers {
        // SAFETY: the heap memory stays where it is when the box moves, and the request that holds
        // `self` holds the buffers too.
        unsafe { Buffers::of_slice(&mut self.0) }
    }
}

/// `InvalidInput` with a reason.
pub(crate) fn invalid_input(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_covers_the_right_bytes_across_buffers() {
        let mut first = [1u8; 4];
        let mut second = [2u8; 6];
        // SAFETY: the arrays outlive the buffers.
        let mut all = unsafe { Buffers::of_slice(&mut first) };
        // SAFETY: as above.
        all.extend(&unsafe { Buffers::of_slice(&mut second) });
        all.range(3, 3).fill_zero();
        assert_eq!(first, [1, 1, 1, 0]);
        assert_eq!(second, [0, 0, 2, 2, 2, 2]);
        all.advance(9);
        assert_eq!(all.len(), 1);
        all.fill_zero();
        assert_eq!(second, [0, 0, 2, 2, 2, 0]);
    }
}
