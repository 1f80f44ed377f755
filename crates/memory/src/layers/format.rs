//! The file format of a layer, version 1.
//!
//! ```text
//! [0, R)        RAM by RAM offset, R bytes; sparse: only overridden pages that are not zero take space
//! [R, ...)      extents: (first page: u64, pages << 1 | is_zero: u64), ascending
//!               checksums: blake3 (32 bytes) for each 2 MiB chunk of RAM that has data pages,
//!               over those pages in order
//! [end - 120)   trailer: magic (8), version u32, flags u32, R u64, extents u64, checksums u64,
//!               nonce (16), parent id (32, zero for none), id (32)
//! ```
//! All numbers are little-endian. The id is the blake3 of the extents, the checksums and the
//! trailer up to the id, so it identifies the content, its place, and all layers below. A
//! *transient* layer (flag 0 clear) has no checksums; a random nonce makes its id unique.
//!
//! There is one encoding of each content; any deviation is refused.

use std::fs::File;
use std::io;
use std::iter;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::LayerId;
use crate::layout::{PAGE_SIZE, RamLayout};
use crate::pages::PageSet;

/// The size of the pieces of RAM that have a checksum each, in bytes.
pub const CHUNK_SIZE: u64 = 2 << 20;
pub(crate) const CHUNK_PAGES: u64 = CHUNK_SIZE / PAGE_SIZE;
/// The most extents of a layer, so that a hostile file cannot make its reader use much memory.
pub(crate) const MAX_EXTENTS: u64 = 1 << 22;

const MAGIC: &[u8; 8] = b"CLONELYR";
const VERSION: u32 = 1;
const FLAG_CHECKSUMS: u32 = 1;
const TRAILER_LEN: u64 = 120;
const EXTENT_LEN: u64 = 16;
const HASH_LEN: u64 = 32;

/// A blake3 hash.
pub(crate) type Hash = [u8; 32];

/// The content of a layer's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes in the layer's file.
    Data,
    /// Zeros, which override the layers below.
    Zero,
}

/// Neighbouring pages that a layer overrides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The page numbers.
    pub pages: Range<u64>,
    /// The content of the pages.
    pub content: Content,
}

/// A layer without its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Index {
    pub(crate) layout: RamLayout,
    pub(crate) parent: Option<LayerId>,
    pub(crate) extents: Vec<Extent>,
    pub(crate) sums: Sums,
}

/// The means of verifying a layer's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sums {
    /// The hash of each chunk that has data, in order.
    Chunks(Vec<Hash>),
    /// None; the nonce makes the layer's id unique.
    Transient { nonce: [u8; 16] },
}

/// The reason why bytes are not a layer's index.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// There is no trailer at the end of the file.
    #[error("it is no layer, or cut short: it does not end with a layer's trailer")]
    Trailer,
    /// The format version is newer than this build can read.
    #[error("it is of format version {0}, and this program reads version {VERSION}")]
    Version(u32),
    /// The index does not match its checksum.
    #[error("its index does not match its checksum")]
    IndexChecksum,
    /// The index is inconsistent, or breaks a rule of the format.
    #[error("its index is invalid: {0}")]
    Invalid(&'static str),
}

impl Index {
    /// The pages that hold data.
    pub(crate) fn data(&self) -> PageSet {
        pages_with(&self.extents, Content::Data)
    }

    /// The index as bytes, to be written at the end of RAM, and the layer's id.
    pub(crate) fn encode(&self) -> (Vec<u8>, LayerId) {
        let mut bytes = Vec::new();
        for Extent { pages, content } in &self.extents {
            let count = (pages.end - pages.start) << 1 | u64::from(*content == Content::Zero);
            bytes.extend(pages.start.to_le_bytes());
            bytes.extend(count.to_le_bytes());
        }
        let (flags, sums, nonce) = match &self.sums {
            Sums::Chunks(hashes) => (FLAG_CHECKSUMS, hashes.as_slice(), [0; 16]),
            Sums::Transient { nonce } => (0, [].as_slice(), *nonce),
        };
        bytes.extend(sums.iter().flatten());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(self.layout.size().to_le_bytes());
        bytes.extend((self.extents.len() as u64).to_le_bytes());
        bytes.extend((sums.len() as u64).to_le_bytes());
        bytes.extend(nonce);
        bytes.extend(self.parent.map_or([0; 32], |parent| parent.0));
        let id = LayerId(*blake3::hash(&bytes).as_bytes());
        bytes.extend(id.0);
        (bytes, id)
    }

    /// Reads the index of a layer's file and checks it.
    pub(crate) fn read(file: &File) -> io::Result<Result<(Self, LayerId), FormatError>> {
        let len = file.metadata()?.len();
        let Some(trailer_at) = len.checked_sub(TRAILER_LEN) else {
            return Ok(Err(FormatError::Trailer));
        };
        let mut trailer = [0; TRAILER_LEN as usize];
        file.read_exact_at(&mut trailer, trailer_at)?;
        let trailer = match Trailer::parse(&trailer, len) {
            Ok(trailer) => trailer,
            Err(error) => return Ok(Err(error)),
        };
        let mut bytes = vec![0; (len - trailer.layout.size()) as usize];
        file.read_exact_at(&mut bytes, trailer.layout.size())?;
        Ok(trailer.index(&bytes))
    }
}

/// The fixed part at the end of a file, after its sizes were checked against the file's.
struct Trailer {
    layout: RamLayout,
    has_sums: bool,
    extents: usize,
    sums: usize,
    nonce: [u8; 16],
    parent: Option<LayerId>,
    id: LayerId,
}

impl Trailer {
    fn parse(bytes: &[u8; TRAILER_LEN as usize], file_len: u64) -> Result<Self, FormatError> {
        let mut fields = Fields(bytes);
        if &fields.take::<8>() != MAGIC {
            return Err(FormatError::Trailer);
        }
        let (version, flags) = (fields.u32(), fields.u32());
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        if flags & !FLAG_CHECKSUMS != 0 {
            return Err(FormatError::Invalid("unknown flags"));
        }
        let (ram, extents, sums) = (fields.u64(), fields.u64(), fields.u64());
        let nonce = fields.take::<16>();
        let parent = fields.take::<32>();
        let layout = RamLayout::new(ram).ok_or(FormatError::Invalid("an odd size of RAM"))?;
        if extents > MAX_EXTENTS || sums > ram.div_ceil(CHUNK_SIZE) {
            return Err(FormatError::Invalid("too many extents or checksums"));
        }
        // This cannot overflow: RAM is at most 2^46 bytes, and the counts were bounded above.
        if ram + extents * EXTENT_LEN + sums * HASH_LEN + TRAILER_LEN != file_len {
            return Err(FormatError::Trailer);
        }
        let has_sums = flags & FLAG_CHECKSUMS != 0;
        if has_sums && nonce != [0; 16] || !has_sums && sums != 0 {
            return Err(FormatError::Invalid("both a nonce and checksums"));
        }
        Ok(Self {
            layout,
            has_sums,
            extents: extents as usize,
            sums: sums as usize,
            nonce,
            parent: (parent != [0; 32]).then_some(LayerId(parent)),
            id: LayerId(fields.take::<32>()),
        })
    }

    /// Decodes the index from its bytes, including the trailer.
    fn index(self, bytes: &[u8]) -> Result<(Index, LayerId), FormatError> {
        let hashed = &bytes[..bytes.len() - HASH_LEN as usize];
        if blake3::hash(hashed) != self.id.0 {
            return Err(FormatError::IndexChecksum);
        }
        let mut fields = Fields(bytes);
        let mut extents: Vec<Extent> = Vec::with_capacity(self.extents);
        for _ in 0..self.extents {
            let extent = extent(fields.u64(), fields.u64())?;
            self.check_extent(extents.last(), &extent)?;
            extents.push(extent);
        }
        let hashes: Vec<Hash> = (0..self.sums).map(|_| fields.take::<32>()).collect();
        let chunks = chunks(&pages_with(&extents, Content::Data)).len();
        if self.has_sums && chunks != hashes.len() {
            return Err(FormatError::Invalid("not one checksum for each chunk"));
        }
        let sums = match self.has_sums {
            true => Sums::Chunks(hashes),
            false => Sums::Transient { nonce: self.nonce },
        };
        let index = Index {
            layout: self.layout,
            parent: self.parent,
            extents,
            sums,
        };
        Ok((index, self.id))
    }

    fn check_extent(&self, before: Option<&Extent>, extent: &Extent) -> Result<(), FormatError> {
        if extent.pages.end > self.layout.size() / PAGE_SIZE {
            return Err(FormatError::Invalid("an extent beyond RAM"));
        }
        if self.parent.is_none() && extent.content == Content::Zero {
            return Err(FormatError::Invalid("zeros that override nothing"));
        }
        let Some(before) = before else { return Ok(()) };
        if extent.pages.start < before.pages.end {
            return Err(FormatError::Invalid("extents overlap or are out of order"));
        }
        if extent.pages.start == before.pages.end && extent.content == before.content {
            return Err(FormatError::Invalid("an extent in two pieces"));
        }
        Ok(())
    }
}

fn extent(first: u64, count: u64) -> Result<Extent, FormatError> {
    let (pages, content) = match count & 1 {
        0 => (count >> 1, Content::Data),
        _ => (count >> 1, Content::Zero),
    };
    let end = first.checked_add(pages).filter(|_| pages > 0);
    let end = end.ok_or(FormatError::Invalid(
        "an extent that is empty or wraps around",
    ))?;
    Ok(Extent {
        pages: first..end,
        content,
    })
}

/// The pages of the extents with this content.
pub(crate) fn pages_with(extents: &[Extent], content: Content) -> PageSet {
    let matching = extents.iter().filter(|extent| extent.content == content);
    matching.map(|extent| extent.pages.clone()).collect()
}

/// A piece of [`CHUNK_SIZE`] of RAM: the runs of pages for which a layer has data, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) runs: Vec<Range<u64>>,
}

impl Chunk {
    /// The chunk's number, counted from the start of RAM.
    pub(crate) fn number(&self) -> u64 {
        self.runs[0].start / CHUNK_PAGES
    }
}

/// The chunks of RAM that contain pages of this set, in order.
pub(crate) fn chunks(data: &PageSet) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    for run in data.runs() {
        let mut start = run.start;
        while start < run.end {
            let chunk = start / CHUNK_PAGES;
            let end = run.end.min((chunk + 1) * CHUNK_PAGES);
            match chunks.last_mut() {
                Some(last) if last.number() == chunk => last.runs.push(start..end),
                _ => chunks.push(Chunk {
                    runs: iter::once(start..end).collect(),
                }),
            }
            start = end;
        }
    }
    chunks
}

/// The hash of a chunk's pages. `buffer` is scratch space.
pub(crate) fn hash_chunk(file: &File, chunk: &Chunk, buffer: &mut Vec<u8>) -> io::Result<Hash> {
    let mut hasher = blake3::Hasher::new();
    for run in &chunk.runs {
        buffer.resize(((run.end - run.start) * PAGE_SIZE) as usize, 0);
        file.read_exact_at(buffer, run.start * PAGE_SIZE)?;
        hasher.update(buffer);
    }
    Ok(*hasher.finalize().as_bytes())
}

/// Reads numbers from the front of bytes whose length was checked before.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let (head, rest) = self.0.split_at(N);
        field.copy_from_slice(head);
        self.0 = rest;
        field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
