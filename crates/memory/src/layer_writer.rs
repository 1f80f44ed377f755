//! Writes layers from guest memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate, ftruncate};

use crate::layers::format::{Content, Extent, Index, MAX_EXTENTS, Sums, chunks, hash_chunk};
use crate::layers::{Layer, LayerError, LayerId};
use crate::layout::{PAGE_SIZE, RamLayout};
use crate::mapping::GuestMemory;
use crate::pages::PageSet;

/// The target number of extents. A layer with more has small gaps of zeros filled, since each
/// extent costs every clone a mapping.
const TARGET_EXTENTS: usize = 512;
/// Gaps of more zero pages than this are never filled, since reading a page of a gap through a
/// mapping uses a page of host memory (once for all clones).
const MAX_FILLED_GAP: u64 = 64;

/// Whether a layer gets checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksums {
    /// All data is read back and hashed. This is for layers that are kept.
    Yes,
    /// The layer gets none, which takes no time, but cannot be verified. This is for a layer that
    /// exists no longer than the host's uptime and that nobody else can write (a live fork's).
    Transient,
}

/// A layer that is being written.
///
/// Pages may be copied while the guest runs, and again after they changed; the last copy counts. So
/// a live fork copies most of its pages before it pauses the guest.
#[derive(Debug)]
pub struct LayerWriter {
    file: File,
    name: String,
    layout: RamLayout,
    parent: Option<LayerId>,
    data: PageSet,
    zeros: PageSet,
}

impl LayerWriter {
    /// Starts a layer in an empty file that is open for reading and writing. The layer builds on
    /// `parent`; without one it is a base, and pages that are not copied are zero.
    ///
    /// # Errors
    /// [`LayerError::NotEmpty`], or [`LayerError::Io`] if the file system does not support files of
    /// this length.
    pub fn new(
        file: File,
        name: impl Into<String>,
        layout: RamLayout,
        parent: Option<LayerId>,
    ) -> Result<Self, LayerError> {
        let writer = Self {
            file,
            name: name.into(),
            layout,
            parent,
            data: PageSet::new(),
            zeros: PageSet::new(),
        };
        let len = writer
            .file
            .metadata()
            .map_err(|e| writer.failed("write", e))?;
        if len.len() != 0 {
            return Err(LayerError::NotEmpty { layer: writer.name });
        }
        // Only the length is set, since reserving blocks would cost as much as writing them.
        ftruncate(&writer.file, layout.size()).map_err(|e| writer.failed("extend", e.into()))?;
        Ok(writer)
    }

    /// Copies these pages in their present state. Zero pages take no space.
    ///
    /// # Errors
    /// [`LayerError::RamSize`] for another machine's memory, [`LayerError::Io`] if the disk is
    /// full. The writer cannot be used afterwards.
    ///
    /// # Panics
    /// If `pages` reach beyond RAM.
    pub fn copy(&mut self, memory: &GuestMemory, pages: &PageSet) -> Result<(), LayerError> {
        if memory.layout() != &self.layout {
            return Err(LayerError::RamSize {
                layer: self.name.clone(),
                wanted: memory.layout().size(),
                found: self.layout.size(),
            });
        }
        let (mut data, mut zeros) = (PageSet::new(), PageSet::new());
        for run in pages.runs() {
            for (range, host) in memory.host_ranges(run.clone()) {
                for (part, content) in by_content(range.clone(), |page| {
                    let at = ((page - range.start) * PAGE_SIZE) as usize;
                    host.is_zero(at..at + PAGE_SIZE as usize)
                }) {
                    if content == Content::Zero {
                        zeros.append(part);
                        continue;
                    }
                    let bytes = bytes_of(&part, range.start);
                    host.write_to(bytes, &self.file, part.start * PAGE_SIZE)
                        .map_err(|e| self.failed("write", e))?;
                    data.append(part);
                }
            }
        }
        self.note(data, zeros)
    }

    /// Writes pages from a buffer, as [`LayerWriter::copy`] does from a guest.
    pub(super) fn write(&mut self, first: u64, bytes: &[u8]) -> Result<(), LayerError> {
        let (mut data, mut zeros) = (PageSet::new(), PageSet::new());
        let pages = first..first + bytes.len() as u64 / PAGE_SIZE;
        for (part, content) in by_content(pages, |page| {
            let at = ((page - first) * PAGE_SIZE) as usize;
            bytes[at..at + PAGE_SIZE as usize]
                .iter()
                .all(|byte| *byte == 0)
        }) {
            if content == Content::Zero {
                zeros.append(part);
                continue;
            }
            let content = &bytes[bytes_of(&part, first)];
            let written = self.file.write_all_at(content, part.start * PAGE_SIZE);
            written.map_err(|e| self.failed("write", e))?;
            data.append(part);
        }
        self.note(data, zeros)
    }

    /// Overrides pages with zeros.
    pub(super) fn zero(&mut self, pages: &PageSet) -> Result<(), LayerError> {
        self.note(PageSet::new(), pages.clone())
    }

    /// Records the written pages. Pages that had data and are zero now are punched out, since the
    /// file must be zero wherever the layer has no data.
    fn note(&mut self, data: PageSet, zeros: PageSet) -> Result<(), LayerError> {
        for run in self.data.intersection(&zeros).runs() {
            let (at, len) = (run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, at, len).map_err(|e| self.failed("write", e.into()))?;
        }
        self.data = self.data.difference(&zeros).union(&data);
        self.zeros = self.zeros.difference(&data).union(&zeros);
        Ok(())
    }

    /// The number of bytes of data in the layer so far.
    pub fn data_bytes(&self) -> u64 {
        self.data.bytes()
    }

    /// Writes the index, and returns the layer. It is not synced: see [`super::install`].
    ///
    /// # Errors
    /// [`LayerError::Io`] if the disk is full or the written data cannot be read back, or
    /// [`LayerError::TooManyExtents`].
    pub fn finish(self, checksums: Checksums) -> Result<Layer, LayerError> {
        let extents = self.extents();
        if extents.len() as u64 > MAX_EXTENTS {
            return Err(LayerError::TooManyExtents {
                layer: self.name,
                extents: extents.len(),
            });
        }
        let mut index = Index {
            layout: self.layout,
            parent: self.parent,
            extents,
            sums: Sums::Chunks(Vec::new()),
        };
        index.sums = match checksums {
            Checksums::Yes => self.hashes(&index.data()).map(Sums::Chunks),
            Checksums::Transient => {
                clone_base::random::bytes().map(|nonce| Sums::Transient { nonce })
            }
        }
        .map_err(|e| self.failed("checksum", e))?;
        let (bytes, id) = index.encode();
        let written = self.file.write_all_at(&bytes, self.layout.size());
        written.map_err(|e| self.failed("write", e))?;
        Ok(Layer::new(self.file, self.name, index, id))
    }

    /// The extents of the index. Small gaps of zeros become data (holes in the file) as far as a
    /// moderate number of extents requires it.
    fn extents(&self) -> Vec<Extent> {
        let mut data = self.data.clone();
        let mut gap = 1;
        while data.runs().len() > TARGET_EXTENTS && gap <= MAX_FILLED_GAP {
            data = self.filled(gap);
            gap *= 2;
        }
        let zeros = match self.parent {
            Some(_) => self.zeros.difference(&data),
            // There is no layer below a base, so its zeros override nothing.
            None => PageSet::new(),
        };
        let extents_of = |set: &PageSet, content| {
            let runs = set.runs().iter();
            runs.map(|pages| Extent {
                pages: pages.clone(),
                content,
            })
            .collect::<Vec<_>>()
        };
        let mut extents = extents_of(&data, Content::Data);
        extents.extend(extents_of(&zeros, Content::Zero));
        extents.sort_by_key(|extent| extent.pages.start);
        extents
    }

    /// The data, with those gaps of up to `gap` pages filled that are known to be all zero.
    fn filled(&self, gap: u64) -> PageSet {
        let gaps = self.data.bridged(gap).difference(&self.data);
        let gaps = match self.parent {
            Some(_) => gaps.intersection(&self.zeros),
            None => gaps,
        };
        self.data.union(&gaps)
    }

    fn hashes(&self, data: &PageSet) -> io::Result<Vec<crate::layers::format::Hash>> {
        let mut buffer = Vec::new();
        let chunks = chunks(data);
        let hashes = chunks
            .iter()
            .map(|chunk| hash_chunk(&self.file, chunk, &mut buffer));
        hashes.collect()
    }

    fn failed(&self, what: &'static str, source: io::Error) -> LayerError {
        LayerError::Io {
            what,
            layer: self.name.clone(),
            source,
        }
    }
}

fn bytes_of(pages: &Range<u64>, origin: u64) -> Range<usize> {
    let at = |page: u64| ((page - origin) * PAGE_SIZE) as usize;
    at(pages.start)..at(pages.end)
}

/// Divides pages into runs that are zero and runs that are not.
fn by_content(
    pages: Range<u64>,
    is_zero: impl Fn(u64) -> bool,
) -> impl Iterator<Item = (Range<u64>, Content)> {
    let content = move |page| match is_zero(page) {
        true => Content::Zero,
        false => Content::Data,
    };
    let mut next = (!pages.is_empty()).then(|| (pages.start, content(pages.start)));
    std::iter::from_fn(move || {
        let (start, kind) = next.take()?;
        // The page that ends a run starts the next one. It is examined only once, because its
        // content may change.
        for page in start + 1..pages.end {
            let found = content(page);
            if found != kind {
                next = Some((page, found));
                return Some((start..page, kind));
            }
        }
        Some((start..pages.end, kind))
    })
}
