//! Disks: raw and qcow2 images, copy-on-write layers over them, and how they are read and written.
//!
//! A disk is a base image under any number of read-only layers, with writes refused, going into the
//! base, or into a layer on top. Layers are this project's own files (see `layer.rs`); a stack of
//! them is read through one merged map, so depth costs nothing. The same code serves a virtual
//! machine (asynchronously, over io_uring or a thread) and tools (blocking).
//!
//! Leaves to others: the virtio block device, where files live, snapshots as a whole.
//!
//! ```
//! use clone_disk::{Disk, DiskSpec, EngineKind, Format, Writes};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! let image = directory.path().join("base.img");
//! std::fs::write(&image, [1; 4096])?;
//! let spec = DiskSpec {
//!     writes: Writes::Ephemeral(None),
//!     ..DiskSpec::image(&image, Format::Raw, false)
//! };
//! let mut disk = Disk::open(spec.open()?, EngineKind::Blocking)?;
//! disk.write_at(&[2; 512], 0)?;
//! let mut sectors = [0; 1024];
//! disk.read_at(&mut sectors, 0)?;
//! assert_eq!((sectors[0], sectors[512]), (2, 1));
//! assert_eq!(std::fs::read(&image)?, [1; 4096]);
//! # Ok(())
//! # }
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod block_map;
mod buffer;
mod disk;
mod engine;
mod error;
mod foreign;
mod layer;
mod op_kind;
mod open;
mod qcow2;
mod remedy;
mod request;
mod room;
mod sparse;
mod spec;

use std::fs::File;
use std::io::{Seek, SeekFrom};

pub use buffer::{Buffer, Buffers};
pub use disk::{Disk, DiskPoint, FrozenExtent, FrozenLayers, NewTop};
pub use engine::EngineKind;
pub use engine::ring::restricted_ring;
pub use error::DiskError;
pub use layer::{LayerHeader, LayerId, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};
pub use qcow2::Qcow2Header;
pub use remedy::Remedy;
pub use request::{Completion, Request};
pub use room::{MEMORY_ROOM, is_in_memory, memory_room};
pub use sparse::copy_file;
pub use spec::{DiskFiles, DiskSpec, Format, ImageSpec, WriteFile, Writes, ephemeral};

/// Zeros to write, and to compare with.
pub(crate) static ZEROS: [u8; 4096] = [0; 4096];

/// The size of a file or block device in bytes.
pub(crate) fn size_of(file: &File) -> Result<u64, DiskError> {
    // A block device has no length in its metadata.
    let mut file = file;
    file.seek(SeekFrom::End(0))
        .map_err(error::io_error("find out the size of a disk file"))
}
