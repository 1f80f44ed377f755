//! The requests to a disk, and their answers.

use std::io;

use crate::buffer::Buffers;

/// A request. Offsets and lengths are in bytes and need no alignment.
#[derive(Clone)]
pub enum Request {
    /// Fill the buffers from `offset` on.
    Read {
        /// Where from.
        offset: u64,
        /// Where to.
        buffers: Buffers,
    },
    /// Write the buffers from `offset` on. Durable after the next flush.
    Write {
        /// Where to.
        offset: u64,
        /// Where from.
        buffers: Buffers,
    },
    /// Make all writes durable that were complete when this was submitted. An ephemeral top layer
    /// has nothing to keep and makes nothing durable.
    Flush,
    /// The content is no longer needed: afterwards it reads as zero or as before, but never as what
    /// a lower layer holds.
    Discard {
        /// Where from.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Afterwards the bytes read as zero.
    WriteZeroes {
        /// Where from.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Whether the space may be given back. (Layers are sparse: they always give it back.)
        unmap: bool,
    },
}

impl Request {
    /// The bytes it is about; `None` for a flush.
    pub(crate) fn range(&self) -> Option<(u64, u64)> {
        match self {
            Self::Read { offset, buffers } | Self::Write { offset, buffers } => {
                Some((*offset, buffers.len()))
            }
            Self::Discard { offset, len } | Self::WriteZeroes { offset, len, .. } => {
                Some((*offset, *len))
            }
            Self::Flush => None,
        }
    }

    /// The bytes that are moved: none for flushes, discards and zeros.
    pub fn data_len(&self) -> u64 {
        match self {
            Self::Read { buffers, .. } | Self::Write { buffers, .. } => buffers.len(),
            _ => 0,
        }
    }

    /// Whether it changes the disk.
    pub fn changes_disk(&self) -> bool {
        !matches!(self, Self::Read { .. } | Self::Flush)
    }
}

/// The answer to a request.
#[derive(Debug)]
pub struct Completion {
    /// The number that the request was submitted with.
    pub tag: u64,
    /// How it went. After an error the range of a write holds old data, new data or a mixture.
    pub result: io::Result<()>,
}
