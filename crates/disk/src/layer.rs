//! Layer files: the blocks of a disk that override what is below.
//!
//! | part | at | content |
//! | --- | --- | --- |
//! | header | 0 | one page, below |
//! | map | 4096 | two bits per block: absent, data, zero; in leaves of 1 KiB |
//! | data | after the map, at a multiple of 1 MiB | block *n* at *n* × block size; sparse |
//!
//! Header, little endian: magic (8), version (4), block size (4), virtual size (8), data offset
//! (8), id (16), parent id or zeros (16), zeros, and in the last 32 bytes the BLAKE3 hash of all
//! before it.
//!
//! The order of writes makes it crash-safe: data is durable before the map refers to it, and the
//! map never removes a block. A block that the map marks as absent or zero is that, even if its
//! place in the file has other data.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::block_map::{BlockMap, LEAF_BLOCKS, LEAF_BYTES};
use crate::error::{DiskError, io_error};
use crate::remedy::Remedy;

pub(crate) const MAGIC: [u8; 8] = *b"CLONEDL\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const HASH_AT: usize = HEADER_BYTES - 32;
const DATA_ALIGN: u64 = 1 << 20;
/// The smallest block size, in bytes. It is the default because guests write whole pages, which
/// then need no copying up.
pub const MIN_BLOCK_SIZE: u32 = 4 << 10;
/// The largest block size, in bytes.
pub const MAX_BLOCK_SIZE: u32 = 64 << 10;
/// The largest disk, in bytes.
const MAX_SIZE: u64 = 64 << 40;
/// The number of leaves that are read from a map at a time.
const READ_LEAVES: usize = 64;

/// The random id of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerId([u8; 16]);

impl LayerId {
    /// Makes a new random id.
    fn random() -> io::Result<Self> {
        clone_base::random::bytes().map(Self)
    }

    /// The id's bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl std::fmt::Display for LayerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for LayerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayerId({self})")
    }
}

/// The header of a layer file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerHeader {
    /// The layer's id.
    pub id: LayerId,
    /// The layer that it was made over; `None` for one made over a base image.
    pub parent: Option<LayerId>,
    /// The size of a block in bytes, a power of two.
    pub block_size: u32,
    /// The size of the disk in bytes.
    pub virtual_size: u64,
}

impl LayerHeader {
    /// Makes a header for a new layer of `virtual_size` bytes, with the smallest blocks.
    ///
    /// # Errors
    /// [`DiskError::Mismatch`] for sizes that a layer cannot have.
    pub fn new(virtual_size: u64, parent: Option<LayerId>) -> Result<Self, DiskError> {
        let header = Self {
            id: LayerId::random().map_err(io_error("draw a name for the layer"))?,
            parent,
            block_size: MIN_BLOCK_SIZE,
            virtual_size,
        };
        header.check().map_err(DiskError::Mismatch)?;
        Ok(header)
    }

    /// Reads the header of `file`.
    ///
    /// # Errors
    /// [`DiskError::Image`] if it is not the header of a layer, or of an unknown version.
    pub fn read(file: &File) -> Result<Self, DiskError> {
        let mut page = [0; HEADER_BYTES];
        file.read_exact_at(&mut page, 0)
            .map_err(|_| refused("shorter than a header"))?;
        Self::decode(&page).map_err(refused)
    }

    /// The number of the disk's blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.virtual_size.div_ceil(u64::from(self.block_size))
    }

    /// The number of the map's leaves.
    fn leaves(&self) -> u64 {
        self.blocks().div_ceil(LEAF_BLOCKS)
    }

    /// The offset of a leaf of the map in the file.
    pub(crate) fn leaf_offset(index: u64) -> u64 {
        HEADER_BYTES as u64 + index * LEAF_BYTES as u64
    }

    /// The offset of block 0 in the file.
    pub(crate) fn data_offset(&self) -> u64 {
        Self::leaf_offset(self.leaves()).next_multiple_of(DATA_ALIGN)
    }

    fn check(&self) -> Result<(), String> {
        let size = self.block_size;
        if !size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&size) {
            return Err(format!("block size of {size} bytes"));
        }
        if self.virtual_size == 0 || self.virtual_size > MAX_SIZE {
            return Err(format!("virtual size of {} bytes", self.virtual_size));
        }
        Ok(())
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut page = [0; HEADER_BYTES];
        page[..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[12..16].copy_from_slice(&self.block_size.to_le_bytes());
        page[16..24].copy_from_slice(&self.virtual_size.to_le_bytes());
        page[24..32].copy_from_slice(&self.data_offset().to_le_bytes());
        page[32..48].copy_from_slice(&self.id.0);
        page[48..64].copy_from_slice(&self.parent.map_or([0; 16], |id| id.0));
        let hash = blake3::hash(&page[..HASH_AT]);
        page[HASH_AT..].copy_from_slice(hash.as_bytes());
        page
    }

    fn decode(page: &[u8; HEADER_BYTES]) -> Result<Self, String> {
        if page[..8] != MAGIC {
            return Err("no layer's magic number".to_owned());
        }
        let u32_at = |at: usize| u32::from_le_bytes(array(page, at));
        let u64_at = |at: usize| u64::from_le_bytes(array(page, at));
        let version = u32_at(8);
        if version != VERSION {
            return Err(format!("version {version}, where {VERSION} is known"));
        }
        if blake3::hash(&page[..HASH_AT]).as_bytes() != &page[HASH_AT..] {
            return Err("its header is corrupt".to_owned());
        }
        let parent = LayerId(array(page, 48));
        let header = Self {
            id: LayerId(array(page, 32)),
            parent: (parent.0 != [0; 16]).then_some(parent),
            block_size: u32_at(12),
            virtual_size: u64_at(16),
        };
        header.check()?;
        if header.data_offset() != u64_at(24) {
            return Err("its data is not where it should be".to_owned());
        }
        Ok(header)
    }
}

fn array<const N: usize>(page: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&page[at..at + N]);
    field
}

fn refused(reason: impl Into<String>) -> DiskError {
    DiskError::Image {
        format: "layer",
        reason: reason.into(),
        remedy: Remedy::Unknown,
    }
}

/// Makes `file` an empty layer, discarding its content. Nothing is synced.
///
/// # Errors
/// [`DiskError::Io`] where the file cannot be written.
pub(crate) fn create(file: &File, header: &LayerHeader) -> Result<(), DiskError> {
    let size = header.data_offset() + header.blocks() * u64::from(header.block_size);
    // The file gets its full length at once, so that a flush need not change its size.
    file.set_len(0)
        .and_then(|()| file.set_len(size))
        .map_err(io_error("size the new layer"))?;
    file.write_all_at(&header.encode(), 0)
        .map_err(io_error("write the header of the new layer"))
}

/// Adds the map of the layer in `file` on top of `map`, as layer `number`.
pub(crate) fn load_map(
    file: &File,
    header: &LayerHeader,
    map: &mut BlockMap,
    number: u8,
    top: bool,
) -> Result<(), DiskError> {
    let leaves = header.leaves();
    let mut bytes = vec![[0; LEAF_BYTES]; READ_LEAVES];
    let mut index = 0;
    while let Some(next) = next_data_leaf(file, index, leaves) {
        index = next;
        let count = READ_LEAVES.min((leaves - index) as usize);
        file.read_exact_at(
            bytes[..count].as_flattened_mut(),
            LayerHeader::leaf_offset(index),
        )
        .map_err(|_| refused("its map is cut short"))?;
        for leaf in &bytes[..count] {
            check_end(header, index, leaf)?;
            map.merge_leaf(index, leaf, number, top)
                .map_err(|_| refused("its map is corrupt"))?;
            index += 1;
        }
    }
    Ok(())
}

/// The next leaf at or after `index` that is not in a hole of the file.
fn next_data_leaf(file: &File, index: u64, leaves: u64) -> Option<u64> {
    if index >= leaves {
        return None;
    }
    let from = LayerHeader::leaf_offset(index);
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(from)) {
        Ok(at) if at >= LayerHeader::leaf_offset(leaves) => None,
        Ok(at) => Some((at - HEADER_BYTES as u64) / LEAF_BYTES as u64),
        // The file has no more data.
        Err(rustix::io::Errno::NXIO) => None,
        // The file system does not report holes.
        Err(_) => Some(index),
    }
}

/// Checks that the last leaf has no entries for blocks past the end of the disk.
fn check_end(header: &LayerHeader, index: u64, leaf: &[u8; LEAF_BYTES]) -> Result<(), DiskError> {
    let first = index * LEAF_BLOCKS;
    let inside = header.blocks().saturating_sub(first).min(LEAF_BLOCKS);
    for block in inside..LEAF_BLOCKS {
        if leaf[block as usize / 4] >> (2 * (block % 4)) & 3 != 0 {
            return Err(refused("its map goes past the end of the disk"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_as_it_was() {
        let parent = LayerHeader::new(1 << 30, None).unwrap();
        let header = LayerHeader::new(1 << 31, Some(parent.id)).unwrap();
        let file = tempfile::tempfile().unwrap();
        create(&file, &header).unwrap();
        assert_eq!(LayerHeader::read(&file).unwrap(), header);
    }

    #[test]
    fn any_flipped_bit_in_a_header_is_noticed() {
        let header = LayerHeader::new(1 << 30, None).unwrap();
        let good = header.encode();
        for byte in (0..128).chain(HASH_AT..HEADER_BYTES) {
            let mut bad = good;
            bad[byte] ^= 0x10;
            assert!(LayerHeader::decode(&bad).is_err(), "byte {byte}");
        }
    }

    #[test]
    fn a_truncated_layer_is_refused() {
        let header = LayerHeader::new(1 << 40, None).unwrap();
        let file = tempfile::tempfile().unwrap();
        create(&file, &header).unwrap();
        file.write_all_at(&[1], LayerHeader::leaf_offset(70))
            .unwrap();
        file.set_len(LayerHeader::leaf_offset(71)).unwrap();
        let loaded = load_map(&file, &header, &mut BlockMap::default(), 1, true);
        assert!(loaded.is_err());
    }

    #[test]
    fn a_map_that_names_blocks_past_the_end_is_refused() {
        let header = LayerHeader::new(5 * 4096, None).unwrap();
        let file = tempfile::tempfile().unwrap();
        create(&file, &header).unwrap();
        file.write_all_at(&[0, 0b0100], LayerHeader::leaf_offset(0))
            .unwrap();
        let mut map = BlockMap::default();
        assert!(load_map(&file, &header, &mut map, 1, true).is_err());
    }
}
