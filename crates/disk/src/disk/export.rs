//! Writes the frozen layers of a disk into a file: a template's layer, or a raw image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::Disk;
use crate::block_map::{BlockMap, Owner};
use crate::error::{DiskError, io_error};
use crate::layer::{self, LayerHeader};
use crate::sparse::{self, CHUNK};

/// The frozen layers of a disk. The disk can be used meanwhile.
pub struct FrozenLayers {
    /// The layers, lowest first; never empty.
    layers: Vec<(LayerHeader, Arc<File>)>,
}

impl Disk {
    /// The layers from number `first` on (0 is the lowest), without the top layer, which takes
    /// writes. Call this after [`Disk::freeze`], or if nothing was written since the last freeze.
    ///
    /// # Errors
    /// [`DiskError::Mismatch`] if there are none.
    pub fn frozen(&self, first: usize) -> Result<FrozenLayers, DiskError> {
        let frozen = self.layers().len().saturating_sub(1);
        let layers = (first..frozen).filter_map(|index| {
            let file = self.layer_file(index)?;
            Some((self.layers()[index], file))
        });
        let layers: Vec<_> = layers.collect();
        match layers.is_empty() {
            true => Err(DiskError::Mismatch(format!(
                "the disk has no frozen layer from {first} on"
            ))),
            false => Ok(FrozenLayers { layers }),
        }
    }

    /// Whether nothing was written since the disk was opened or last frozen. False for a disk
    /// without layers, where this is unknown.
    pub fn is_top_empty(&self) -> bool {
        let stack = self.stack.as_ref().filter(|stack| stack.writable);
        stack.is_some_and(|stack| !stack.map.holds(stack.top_number()))
    }

    /// Writes the whole disk into `image`, an empty file, as a raw image with holes for zeros.
    /// Waits; nothing else may be in flight.
    ///
    /// # Errors
    /// The host's.
    pub fn write_raw(&mut self, image: &File) -> io::Result<()> {
        image.set_len(self.size())?;
        let mut buffer = vec![0; CHUNK];
        let mut offset = 0;
        while offset < self.size() {
            let len = (self.size() - offset).min(CHUNK as u64) as usize;
            self.read_at(&mut buffer[..len], offset)?;
            sparse::write(image, &buffer[..len], offset)?;
            offset += len as u64;
        }
        Ok(())
    }
}

/// A part of a disk that frozen layers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrozenExtent {
    /// The offset in the disk, in bytes.
    pub offset: u64,
    /// The length in bytes.
    pub len: u64,
    /// Whether it has data; otherwise it reads as zero, whatever is below.
    pub has_data: bool,
}

impl FrozenLayers {
    /// Merges the layers into one in `file`, an empty file, over the layers below them. The result
    /// has the id of the highest layer, whose view of the disk it holds. Nothing is synced.
    ///
    /// # Errors
    /// [`DiskError::Io`], or [`DiskError::Image`] if a layer's file was damaged.
    pub fn export(self, file: &File) -> Result<LayerHeader, DiskError> {
        let (lowest, highest) = (&self.layers[0].0, &self.layers[self.layers.len() - 1].0);
        let header = LayerHeader {
            parent: lowest.parent,
            ..*highest
        };
        layer::create(file, &header)?;
        let mut map = BlockMap::default();
        let block_size = u64::from(header.block_size);
        self.walk(|run, source| {
            let Some((from, source)) = source else {
                map.set(run, Owner::Zero { top: true });
                return Ok(());
            };
            let at = |header: &LayerHeader| header.data_offset() + run.start * block_size;
            let len = (run.end - run.start) * block_size;
            sparse::copy_range(source, at(from), file, at(&header), len)
                .map_err(io_error("copy a layer's blocks"))?;
            map.set(run, Owner::Layer(1));
            Ok(())
        })?;
        for index in map.leaf_indices() {
            file.write_all_at(&map.top_leaf(index, 1), LayerHeader::leaf_offset(index))
                .map_err(io_error("write the map of a layer"))?;
        }
        Ok(header)
    }

    /// Reads all that the layers hold, in the order of the disk: calls `found` with each extent, and
    /// with its content if it has data. An extent with data has at most `most` bytes, and none ends
    /// beyond the disk.
    ///
    /// # Errors
    /// Those of `found`, [`DiskError::Io`], or [`DiskError::Image`] if a layer's file was damaged.
    pub fn read<E: From<DiskError>>(
        &self,
        most: usize,
        mut found: impl FnMut(FrozenExtent, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let header = &self.layers[0].0;
        let (size, block_size) = (header.virtual_size, u64::from(header.block_size));
        let mut content = vec![0; most];
        self.walk(|run, source| {
            let (mut offset, end) = (run.start * block_size, size.min(run.end * block_size));
            let Some((from, source)) = source else {
                let extent = FrozenExtent {
                    offset,
                    len: end - offset,
                    has_data: false,
                };
                return found(extent, &[]);
            };
            while offset < end {
                let len = (end - offset).min(most as u64);
                let part = &mut content[..len as usize];
                source
                    .read_exact_at(part, from.data_offset() + offset)
                    .map_err(io_error("read a layer's blocks"))?;
                let extent = FrozenExtent {
                    offset,
                    len,
                    has_data: true,
                };
                found(extent, part)?;
                offset += len;
            }
            Ok(())
        })
    }

    /// Calls `found` with each run of blocks that the layers hold, ascending: with the layer that has
    /// their data, or with `None` where they are zero.
    fn walk<E: From<DiskError>>(
        &self,
        mut found: impl FnMut(Range<u64>, Option<&(LayerHeader, Arc<File>)>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut owners = BlockMap::default();
        for (number, (header, layer)) in (1..).zip(&self.layers) {
            layer::load_map(layer, header, &mut owners, number, false)?;
        }
        let blocks = self.layers[0].0.blocks();
        let mut block = 0;
        while block < blocks {
            let (owner, count) = owners.run(block..blocks);
            let run = block..block + count;
            match owner {
                Owner::Base => {}
                Owner::Zero { .. } => found(run, None)?,
                Owner::Layer(number) => {
                    found(run, Some(&self.layers[usize::from(number) - 1]))?;
                }
            }
            block += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::EngineKind;
    use crate::request::Request;
    use crate::spec::{DiskFiles, Format, WriteFile};

    const BLOCKS: u64 = 40;
    const SIZE: u64 = BLOCKS * 4096;

    fn base() -> File {
        let base = tempfile::tempfile().unwrap();
        base.write_all_at(&vec![0xBA; SIZE as usize], 0).unwrap();
        base
    }

    fn open(base: &File, layers: Vec<File>) -> Disk {
        let files = DiskFiles {
            base: Some((base.try_clone().unwrap(), Format::Raw)),
            backing: Vec::new(),
            layers,
            writes: WriteFile::Layer {
                file: tempfile::tempfile().unwrap(),
                durable: false,
            },
        };
        Disk::open(files, EngineKind::Blocking).unwrap()
    }

    fn content(disk: &mut Disk) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_top_is_empty_until_something_is_written() {
        let mut disk = open(&base(), Vec::new());
        assert!(disk.is_top_empty());
        disk.write_at(&[1; 512], 4096).unwrap();
        assert!(!disk.is_top_empty());
        disk.freeze(tempfile::tempfile().unwrap(), false).unwrap();
        assert!(disk.is_top_empty());
        let (offset, len, unmap) = (0, 4096, true);
        disk.call(Request::WriteZeroes { offset, len, unmap })
            .unwrap();
        assert!(!disk.is_top_empty());
    }

    #[test]
    fn a_raw_image_of_a_stack_reads_the_same_and_has_holes() {
        let mut disk = open(&base(), Vec::new());
        disk.write_at(&[7; 4096], 4096).unwrap();
        let (offset, len, unmap) = (8192, SIZE - 8192, true);
        disk.call(Request::WriteZeroes { offset, len, unmap })
            .unwrap();
        let image = tempfile::tempfile().unwrap();
        disk.write_raw(&image).unwrap();
        let mut bytes = vec![1; SIZE as usize];
        image.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, content(&mut disk));
        let hole = rustix::fs::seek(&image, rustix::fs::SeekFrom::Data(8192));
        assert_eq!(hole, Err(rustix::io::Errno::NXIO));
    }

    #[test]
    fn what_frozen_layers_hold_is_read_part_by_part() {
        let mut disk = open(&base(), Vec::new());
        disk.write_at(&[1; 3 * 4096], 4096).unwrap();
        disk.freeze(tempfile::tempfile().unwrap(), false).unwrap();
        disk.write_at(&[2; 4096], 8192).unwrap();
        let (offset, len, unmap) = (SIZE - 4096, 4096, true);
        disk.call(Request::WriteZeroes { offset, len, unmap })
            .unwrap();
        disk.freeze(tempfile::tempfile().unwrap(), false).unwrap();
        let mut parts = Vec::new();
        let read = disk.frozen(0).unwrap().read(6000, |extent, content| {
            parts.push((extent.offset, extent.len, content.first().copied()));
            assert_eq!(
                content.len() as u64,
                if extent.has_data { extent.len } else { 0 }
            );
            Ok::<(), DiskError>(())
        });
        read.unwrap();
        let expected = [
            (4096, 4096, Some(1)),
            (8192, 4096, Some(2)),
            (12288, 4096, Some(1)),
            (SIZE - 4096, 4096, None),
        ];
        assert_eq!(parts, expected);
        let stopped = disk.frozen(0).unwrap().read(4096, |_, _| {
            Err::<(), _>(DiskError::Mismatch("enough".to_owned()))
        });
        stopped.unwrap_err();
    }

    proptest! {
        /// However a disk was written and frozen, its export over the layers below it reads the
        /// same, and the next export lies on it.
        #[test]
        fn an_export_stands_for_the_layers_that_it_is_of(
            steps in prop::collection::vec((0..BLOCKS, 1u64..6, 0u8..3), 1..30)
        ) {
            let base = base();
            let mut disk = open(&base, Vec::new());
            let mut exported: Vec<File> = Vec::new();
            let mut kept = 0;
            for (at, (block, count, what)) in steps.iter().enumerate() {
                let offset = block * 4096;
                let len = (count * 4096).min(SIZE - offset);
                match what {
                    0 => disk.write_at(&vec![at as u8; len as usize - 100], offset).unwrap(),
                    1 => disk.call(Request::WriteZeroes { offset, len, unmap: true }).unwrap(),
                    _ => {
                        disk.freeze(tempfile::tempfile().unwrap(), false).unwrap();
                        if at % 2 == 0 {
                            let file = tempfile::tempfile().unwrap();
                            disk.frozen(kept).unwrap().export(&file).unwrap();
                            exported.push(file);
                            kept = disk.layers().len() - 1;
                            let files = exported.iter().map(|f| f.try_clone().unwrap()).collect();
                            let mut copy = open(&base, files);
                            prop_assert_eq!(content(&mut copy), content(&mut disk));
                        }
                    }
                }
            }
        }
    }
}
