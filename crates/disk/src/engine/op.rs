//! One primitive piece of input or output on one file, and its blocking execution.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use crate::ZEROS;
use crate::buffer::{Buffer, Buffers};
use crate::op_kind::OpKind;
use crate::qcow2::Qcow2Image;

/// The target of an op. It is cheap to clone.
#[derive(Clone)]
pub(crate) enum Target {
    /// A file or host block device whose bytes are used as they are.
    File(Arc<File>),
    /// A qcow2 image; its calls block.
    Qcow2(Arc<Qcow2Image>),
}

/// An op on the `target`-th target of a disk, at `offset` bytes.
#[derive(Clone)]
pub(crate) struct Op {
    pub(crate) target: usize,
    pub(crate) offset: u64,
    pub(crate) kind: OpKind,
}

/// The number of zeros that one system call writes, for file systems that cannot make them
/// themselves.
const ZERO_CHUNK: u64 = 512 * ZEROS.len() as u64;

/// The progress of an op after one system call.
pub(crate) enum Progress {
    /// The op is finished.
    Done,
    /// This part of the op remains.
    Again(Op),
}

impl Op {
    /// The flags that `fallocate` takes for this op.
    pub(crate) fn fallocate(&self) -> Option<(FallocateFlags, u64)> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match self.kind {
            OpKind::Zero { len, punch: true } | OpKind::Discard { len } => Some((punch, len)),
            OpKind::Zero { len, punch: false } => Some((zero, len)),
            _ => None,
        }
    }

    /// Evaluates the result of the system call for this op (`count` bytes, or 0 if the call returns
    /// none).
    pub(crate) fn progress(mut self, outcome: io::Result<u64>) -> io::Result<Progress> {
        let count = match outcome {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(Progress::Again(self));
            }
            Err(error) => return self.recover(error),
        };
        match &mut self.kind {
            OpKind::Sync | OpKind::Zero { .. } | OpKind::Discard { .. } => {
                return Ok(Progress::Done);
            }
            OpKind::Read(buffers) if count == 0 => {
                buffers.fill_zero();
                return Ok(Progress::Done);
            }
            OpKind::Write(_) | OpKind::Fill { .. } if count == 0 => {
                return Err(io::ErrorKind::WriteZero.into());
            }
            OpKind::Read(buffers) | OpKind::Write(buffers) => {
                if count == buffers.len() {
                    return Ok(Progress::Done);
                }
                buffers.advance(count);
            }
            OpKind::Fill { buffers, rest } => {
                buffers.advance(count);
                if buffers.is_empty() {
                    let next = (*rest).min(ZERO_CHUNK);
                    *buffers = zeros(next);
                    *rest -= next;
                }
                if buffers.is_empty() {
                    return Ok(Progress::Done);
                }
            }
        }
        self.offset += count;
        Ok(Progress::Again(self))
    }

    /// The fallback for an operation that failed with `error`.
    fn recover(self, error: io::Error) -> io::Result<Progress> {
        let unsupported = matches!(
            error.raw_os_error(),
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY)
        );
        match self.kind {
            OpKind::Discard { .. } if unsupported => Ok(Progress::Done),
            OpKind::Zero { len, .. } if unsupported => Ok(Progress::Again(Op {
                kind: OpKind::Fill {
                    buffers: zeros(len.min(ZERO_CHUNK)),
                    rest: len.saturating_sub(ZERO_CHUNK),
                },
                ..self
            })),
            _ => Err(error),
        }
    }

    /// Executes the op and waits for it.
    pub(crate) fn execute(self, target: &Target) -> io::Result<()> {
        let file = match target {
            Target::File(file) => file,
            Target::Qcow2(image) => return image.execute(self.offset, self.kind),
        };
        let mut op = self;
        loop {
            let outcome = op.call(file);
            match op.progress(outcome)? {
                Progress::Done => return Ok(()),
                Progress::Again(rest) => op = rest,
            }
        }
    }

    /// The bytes that this op writes.
    #[cfg(test)]
    pub(crate) fn written(&self) -> Vec<u8> {
        match &self.kind {
            OpKind::Write(buffers) => buffers.to_vec(),
            _ => Vec::new(),
        }
    }

    /// Makes one system call of this op.
    fn call(&self, file: &File) -> io::Result<u64> {
        let (fd, offset) = (file.as_raw_fd(), file_offset(self.offset)?);
        let count = match &self.kind {
            OpKind::Read(buffers) => {
                let (iovecs, count) = buffers.iovecs();
                // SAFETY: `Buffer::new` was promised memory that is writable until the request is
                // complete; the array of iovecs lives in `self`.
                unsafe { libc::preadv(fd, iovecs, count as libc::c_int, offset) }
            }
            OpKind::Write(buffers) | OpKind::Fill { buffers, .. } => {
                let (iovecs, count) = buffers.iovecs();
                // SAFETY: as above, readable.
                unsafe { libc::pwritev(fd, iovecs, count as libc::c_int, offset) }
            }
            OpKind::Sync => {
                rustix::fs::fdatasync(file)?;
                0
            }
            OpKind::Zero { .. } | OpKind::Discard { .. } => {
                if let Some((flags, len)) = self.fallocate() {
                    rustix::fs::fallocate(file, flags, self.offset, len)?;
                }
                0
            }
        };
        // The conversion fails only for a negative count, which means an error.
        u64::try_from(count).map_err(|_| io::Error::last_os_error())
    }
}

/// Converts an offset to the kernel's type.
fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| crate::buffer::invalid_input("offset out of range"))
}

/// Buffers of `len` zero bytes, all over the same page. The kernel only reads them.
pub(crate) fn zeros(len: u64) -> Buffers {
    let page = |size: u64| {
        // SAFETY: the page is static, is only the source of writes, and `size` is within it.
        unsafe { Buffer::new(ZEROS.as_ptr().cast_mut(), size as usize) }
    };
    let size = ZEROS.len() as u64;
    let mut buffers: Vec<Buffer> = (0..len / size).map(|_| page(size)).collect();
    if !len.is_multiple_of(size) {
        buffers.push(page(len % size));
    }
    buffers.into()
}
