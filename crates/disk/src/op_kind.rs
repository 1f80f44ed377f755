//! The primitive kinds of input and output, which files and images carry out.

use crate::buffer::Buffers;

/// What to do. Each either succeeds as a whole or fails.
#[derive(Clone)]
pub(crate) enum OpKind {
    /// Fill the buffers; past the end of the file there are zeros.
    Read(Buffers),
    /// Write the buffers.
    Write(Buffers),
    /// Make everything that was written before durable.
    Sync,
    /// Make `len` bytes read as zero, giving the space back where `punch` allows it.
    Zero {
        /// How many bytes.
        len: u64,
        /// Whether the space may be given back.
        punch: bool,
    },
    /// Write `rest` zeros after those in the buffers (the slow way of `Zero`).
    Fill {
        /// Zeros of the next write.
        buffers: Buffers,
        /// How many bytes follow.
        rest: u64,
    },
    /// Give the space back if that is possible; afterwards the bytes may read as anything.
    Discard {
        /// How many bytes.
        len: u64,
    },
}
