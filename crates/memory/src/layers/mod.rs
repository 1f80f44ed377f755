//! Layers: sets of guest pages in files, each overriding the layers under it.
//!
//! A layer's file holds RAM by RAM offset, so that it can be mapped directly, and an index of the
//! pages that it overrides (see [`mod@format`]). Layers never change once written. The places and
//! names of layer files are decided by the snapshot, not by this module.

pub mod format;
mod stack;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

pub use self::format::{CHUNK_SIZE, Content, Extent, FormatError};
use self::format::{Chunk, Hash, Index, Sums, chunks, hash_chunk};
pub use self::stack::{LayerStack, MAX_MAPPINGS, Piece, Source};
use crate::layout::{PAGE_SIZE, RamLayout};
use crate::pages::PageSet;

/// The id of a layer: the hash of its content, of the content's place, and of the layers below.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerId(pub [u8; 32]);

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerId({self})")
    }
}

/// The errors of reading, writing or using a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// An operation of the host failed.
    #[error("cannot {what} memory layer {layer}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The layer's name.
        layer: String,
        /// The host's error.
        source: io::Error,
    },
    /// The file is not a valid layer.
    #[error("cannot use memory layer {layer}: {source}")]
    Format {
        /// The layer's name.
        layer: String,
        /// The problem with the file.
        source: FormatError,
    },
    /// The content does not match its checksum.
    #[error(
        "memory layer {layer} is corrupt: its pages at RAM offset {offset:#x} (2 MiB) do not match \
         their checksum"
    )]
    Corrupt {
        /// The layer's name.
        layer: String,
        /// The RAM offset of the piece that does not match, in bytes.
        offset: u64,
    },
    /// The layer was written without checksums.
    #[error("memory layer {layer} is transient: it has no checksums to verify it by")]
    Transient {
        /// The layer's name.
        layer: String,
    },
    /// The layer was made for another parent.
    #[error("memory layer {layer} belongs on {}, but lies on {}", name(.wanted), name(.found))]
    Parent {
        /// The layer's name.
        layer: String,
        /// The parent that the layer was made for.
        wanted: Option<LayerId>,
        /// The layer that it was put on.
        found: Option<LayerId>,
    },
    /// The layer is of a machine with another size of RAM.
    #[error("memory layer {layer} is of {found} bytes of RAM, not {wanted}")]
    RamSize {
        /// The layer's name.
        layer: String,
        /// The required size of RAM, in bytes.
        wanted: u64,
        /// The size of RAM of the layer, in bytes.
        found: u64,
    },
    /// A stack needs at least one layer.
    #[error("a stack of memory layers needs at least one")]
    NoLayer,
    /// The file to write to is not empty.
    #[error("cannot write memory layer {layer}: the file is not empty")]
    NotEmpty {
        /// The layer's name.
        layer: String,
    },
    /// The layer has more extents than the format allows.
    #[error(
        "cannot write memory layer {layer}: {extents} extents, and at most {} are possible",
        format::MAX_EXTENTS
    )]
    TooManyExtents {
        /// The layer's name.
        layer: String,
        /// The number of extents.
        extents: usize,
    },
}

fn name(id: &Option<LayerId>) -> String {
    id.map_or_else(|| "nothing".to_owned(), |id| format!("layer {id}"))
}

/// A layer. It is immutable and cheap to clone.
#[derive(Clone, Debug)]
pub struct Layer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    name: String,
    index: Index,
    id: LayerId,
}

impl Layer {
    /// Opens a layer's file and checks its index, but not its pages (see [`Layer::verify`]). `name`
    /// identifies the layer in errors; most often it is a path.
    ///
    /// The file must not change or shrink while the layer is in use; otherwise guests that map it
    /// read other data or are killed. So it must be in a directory that only its owner writes, or
    /// be a sealed memory file.
    ///
    /// # Errors
    /// [`LayerError::Format`] if the file is not a valid layer. Nothing in the file is trusted.
    pub fn open(file: File, name: impl Into<String>) -> Result<Self, LayerError> {
        let layer = name.into();
        match Index::read(&file) {
            Ok(Ok((index, id))) => Ok(Self::new(file, layer, index, id)),
            Ok(Err(source)) => Err(LayerError::Format { layer, source }),
            Err(source) => Err(LayerError::Io {
                what: "read",
                layer,
                source,
            }),
        }
    }

    pub(crate) fn new(file: File, name: String, index: Index, id: LayerId) -> Self {
        Self {
            inner: Arc::new(Inner {
                file,
                name,
                index,
                id,
            }),
        }
    }

    /// The layer's id.
    pub fn id(&self) -> LayerId {
        self.inner.id
    }

    /// The parent that the layer was made for; `None` for a base.
    pub fn parent(&self) -> Option<LayerId> {
        self.inner.index.parent
    }

    /// The layer's name in errors.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The layout of the RAM.
    pub fn layout(&self) -> &RamLayout {
        &self.inner.index.layout
    }

    /// The pages that the layer overrides, ascending.
    pub fn extents(&self) -> &[Extent] {
        &self.inner.index.extents
    }

    /// All pages that the layer overrides, by data or by zeros.
    pub fn pages(&self) -> PageSet {
        self.extents().iter().map(|it| it.pages.clone()).collect()
    }

    /// The pages for which the layer has data.
    pub fn data(&self) -> PageSet {
        self.inner.index.data()
    }

    /// The layer's file: RAM by RAM offset, then the index.
    pub fn file(&self) -> &File {
        &self.inner.file
    }

    /// Whether the layer has checksums.
    pub fn is_checksummed(&self) -> bool {
        matches!(self.inner.index.sums, Sums::Chunks(_))
    }

    /// Checks all pages on `threads` threads (at least one).
    ///
    /// # Errors
    /// [`LayerError::Corrupt`] with the first wrong offset that is found, or
    /// [`LayerError::Transient`] if the layer has no checksums.
    pub fn verify(&self, threads: usize) -> Result<(), LayerError> {
        let work = self.checksums()?;
        let next = AtomicUsize::new(0);
        let check = || {
            let mut buffer = Vec::new();
            while let Some((chunk, hash)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.check_chunk(chunk, hash, &mut buffer)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(check)).collect();
            let mut result = check();
            for other in others {
                match other.join() {
                    Ok(found) => result = result.and(found),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            result
        })
    }

    /// Checks the pages of the 2 MiB of RAM around an offset, for verification piece by piece in
    /// the order of use. A piece without data is always correct.
    ///
    /// # Errors
    /// As [`Layer::verify`].
    pub fn verify_around(&self, offset: u64) -> Result<(), LayerError> {
        let mut found = self.checksums()?.into_iter();
        match found.find(|(chunk, _)| chunk.number() == offset / CHUNK_SIZE) {
            Some((chunk, hash)) => self.check_chunk(&chunk, &hash, &mut Vec::new()),
            None => Ok(()),
        }
    }

    fn checksums(&self) -> Result<Vec<(Chunk, Hash)>, LayerError> {
        match &self.inner.index.sums {
            Sums::Chunks(hashes) => Ok(chunks(&self.data())
                .into_iter()
                .zip(hashes.iter().copied())
                .collect()),
            Sums::Transient { .. } => Err(LayerError::Transient {
                layer: self.inner.name.clone(),
            }),
        }
    }

    fn check_chunk(
        &self,
        chunk: &Chunk,
        hash: &Hash,
        buffer: &mut Vec<u8>,
    ) -> Result<(), LayerError> {
        let found = hash_chunk(&self.inner.file, chunk, buffer).map_err(|e| self.io("read", e))?;
        if found == *hash {
            return Ok(());
        }
        Err(LayerError::Corrupt {
            layer: self.inner.name.clone(),
            offset: chunk.number() * CHUNK_SIZE,
        })
    }

    /// Copies the layer into a sealed memory file: the copy cannot change and never waits for a
    /// disk, and uses host memory for its data while it is open anywhere. One copy serves all
    /// clones that are given its file.
    ///
    /// # Errors
    /// [`LayerError::Io`] if the layer cannot be read or the host is out of memory.
    pub fn to_memory(&self) -> Result<Self, LayerError> {
        let copy = self
            .copy_to_memory()
            .map_err(|e| self.io("copy to memory", e))?;
        let index = self.inner.index.clone();
        Ok(Self::new(
            copy,
            self.inner.name.clone(),
            index,
            self.inner.id,
        ))
    }

    fn copy_to_memory(&self) -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let copy = File::from(memfd_create("memory-layer", flags)?);
        let ram = self.layout().size();
        ftruncate(&copy, ram)?;
        let mut buffer = Vec::new();
        for run in chunks(&self.data()).iter().flat_map(|chunk| &chunk.runs) {
            buffer.resize(((run.end - run.start) * PAGE_SIZE) as usize, 0);
            self.inner
                .file
                .read_exact_at(&mut buffer, run.start * PAGE_SIZE)?;
            copy.write_all_at(&buffer, run.start * PAGE_SIZE)?;
        }
        copy.write_all_at(&self.inner.index.encode().0, ram)?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&copy, seals)?;
        Ok(copy)
    }

    fn io(&self, what: &'static str, source: io::Error) -> LayerError {
        LayerError::Io {
            what,
            layer: self.inner.name.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests;
