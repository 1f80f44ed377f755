//! Points in the life of a disk that it can be set back to, and the merging of layers that many
//! points leave behind.
//!
//! A point is the disk's layers without the top one, and their merged map. Layers are shared by
//! points and the disk, and the file of a layer that nobody uses any more is closed.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::freeze::NewTop;
use super::{Disk, Stack};
use crate::block_map::BlockMap;
use crate::engine::Target;
use crate::error::DiskError;
use crate::layer::LayerHeader;

/// The content of a disk at a point in time. Cheap to clone.
#[derive(Clone)]
pub struct DiskPoint {
    layers: Vec<LayerHeader>,
    /// The base, and the layers' files.
    targets: Vec<Target>,
    map: BlockMap,
    size: u64,
}

impl DiskPoint {
    /// The files of the layers from number `first` on (0 is the lowest), by which points that share
    /// layers can be told apart, and the bytes that each takes on its host.
    pub fn layer_files(&self, first: usize) -> impl Iterator<Item = (&Arc<File>, u64)> {
        let files = self.targets.iter().skip(1 + first);
        files.filter_map(|target| match target {
            Target::File(file) => Some((file, file.metadata().map_or(0, |it| it.blocks() * 512))),
            Target::Qcow2(_) => None,
        })
    }
}

impl DiskPoint {
    /// Makes the layer that takes the writes of a disk that is set back to this point, in `file`,
    /// which is empty and open for reading and writing. Everything that the host may refuse is done
    /// here, so that a disk can be set back whatever happens.
    ///
    /// # Errors
    /// [`DiskError::Io`] for errors of the host, as where the disk is full.
    pub fn new_top(&self, file: File) -> Result<NewTop, DiskError> {
        NewTop::create(file, self.size, &self.layers, false)
    }
}

impl Disk {
    /// The content of a writable disk, whose top layer must be empty: call this after
    /// [`Disk::freeze`], or if nothing was written since.
    ///
    /// # Errors
    /// [`DiskError::Mismatch`] where there is no such layer, or requests are in flight.
    pub fn point(&self) -> Result<DiskPoint, DiskError> {
        self.require_idle()?;
        match &self.stack {
            Some(stack) if self.is_top_empty() => {
                let below = stack.layers.len() - 1;
                Ok(DiskPoint {
                    layers: stack.layers[..below].to_vec(),
                    targets: self.engine.targets()[..=below].to_vec(),
                    map: stack.map.clone(),
                    size: self.size,
                })
            }
            _ => Err(DiskError::Mismatch(
                "the disk has no empty layer on top".to_owned(),
            )),
        }
    }

    /// Sets the disk back to a point of its own. Later writes go to `top`, which was made for that
    /// point ([`DiskPoint::new_top`]). No request may be in flight.
    ///
    /// # Errors
    /// [`DiskError::Mismatch`]. The disk continues unchanged.
    pub fn set_back(&mut self, point: &DiskPoint, top: NewTop) -> Result<(), DiskError> {
        self.require_idle()?;
        if top.header.parent != point.layers.last().map(|below| below.id) {
            return Err(DiskError::Mismatch(
                "the new layer was made for another point".to_owned(),
            ));
        }
        let mut targets = point.targets.clone();
        targets.push(Target::File(top.file));
        let has_base = self.stack.as_ref().is_none_or(|stack| stack.has_base);
        let mut layers = point.layers.clone();
        layers.push(top.header);
        let mut stack = Stack::new(has_base, layers, point.map.clone());
        stack.writable = true;
        stack.room = top.room;
        self.engine.set_targets(targets);
        self.stack = Some(stack);
        Ok(())
    }

    /// Replaces the layers from number `first` on, except the top one, by `merged`, to which
    /// [`FrozenLayers::export`](super::FrozenLayers::export) has written them. Nothing may have been frozen since, and no request
    /// may be in flight.
    ///
    /// # Errors
    /// [`DiskError::Mismatch`] if these are not the layers that were merged. The disk continues
    /// unchanged.
    pub fn replace_frozen(
        &mut self,
        first: usize,
        header: LayerHeader,
        merged: File,
    ) -> Result<(), DiskError> {
        self.require_idle()?;
        let mismatch = || DiskError::Mismatch("other layers were merged".to_owned());
        let stack = self.stack.as_mut().ok_or_else(mismatch)?;
        let top = stack.layers.len() - 1;
        let replaced = stack.layers.get(first..top).unwrap_or_default();
        match (replaced.first(), replaced.last()) {
            (Some(lowest), Some(highest))
                if (lowest.parent, highest.id) == (header.parent, header.id) => {}
            _ => return Err(mismatch()),
        }
        let numbers = (first + 1) as u8..top as u8 + 1;
        stack.layers.splice(first..top, [header]);
        stack.map.merge_layers(numbers.start, numbers.end);
        let mut targets = self.engine.targets().to_vec();
        targets.splice(
            usize::from(numbers.start)..usize::from(numbers.end),
            [Target::File(Arc::new(merged))],
        );
        self.engine.set_targets(targets);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::EngineKind;
    use crate::request::Request;
    use crate::spec::{DiskFiles, Format, WriteFile};

    const BLOCKS: u64 = 40;
    const SIZE: u64 = BLOCKS * 4096;

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    fn disk() -> Disk {
        let base = file();
        base.write_all_at(&vec![0xBA; SIZE as usize], 0).unwrap();
        let files = DiskFiles {
            base: Some((base, Format::Raw)),
            backing: Vec::new(),
            layers: Vec::new(),
            writes: WriteFile::Layer {
                file: file(),
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
    fn a_disk_whose_top_layer_holds_something_is_no_point() {
        let mut disk = disk();
        disk.point().unwrap();
        disk.write_at(&[1; 512], 0).unwrap();
        assert!(disk.point().is_err());
        disk.freeze(file(), false).unwrap();
        assert_eq!(disk.point().unwrap().layer_files(0).count(), 1);
    }

    #[test]
    fn layers_that_were_not_merged_are_not_replaced() {
        let mut disk = disk();
        for byte in 0..3 {
            disk.write_at(&[byte; 4096], u64::from(byte) * 4096)
                .unwrap();
            disk.freeze(file(), false).unwrap();
        }
        let merged = file();
        let header = disk.frozen(0).unwrap().export(&merged).unwrap();
        disk.freeze(file(), false).unwrap();
        let before = content(&mut disk);
        assert!(disk.replace_frozen(0, header, merged).is_err());
        assert_eq!(content(&mut disk), before);
    }

    proptest! {
        /// However a disk was written, set back and merged, each of its points is what it was.
        #[test]
        fn every_point_comes_back(
            steps in prop::collection::vec((0..BLOCKS, 1u64..6, 0u8..6), 1..40)
        ) {
            let mut disk = disk();
            let mut points: Vec<(DiskPoint, Vec<u8>)> = Vec::new();
            for (at, (block, count, what)) in steps.iter().enumerate() {
                let offset = block * 4096;
                let len = (count * 4096).min(SIZE - offset);
                match what {
                    0 | 1 => {
                        let bytes = vec![at as u8; len as usize - 100];
                        disk.write_at(&bytes, offset).unwrap();
                    }
                    2 => {
                        let unmap = true;
                        disk.call(Request::WriteZeroes { offset, len, unmap }).unwrap();
                    }
                    3 => {
                        if !disk.is_top_empty() {
                            disk.freeze(file(), false).unwrap();
                        }
                        points.push((disk.point().unwrap(), content(&mut disk)));
                    }
                    4 if !points.is_empty() => {
                        let (point, expected) = &points[*block as usize % points.len()];
                        disk.set_back(point, point.new_top(file()).unwrap()).unwrap();
                        prop_assert_eq!(&content(&mut disk), expected);
                    }
                    5 if disk.layers().len() > 2 => {
                        let before = content(&mut disk);
                        let first = *block as usize % (disk.layers().len() - 2);
                        let merged = file();
                        let header = disk.frozen(first).unwrap().export(&merged).unwrap();
                        disk.replace_frozen(first, header, merged).unwrap();
                        prop_assert_eq!(disk.layers().len(), first + 2);
                        prop_assert_eq!(content(&mut disk), before);
                    }
                    _ => {}
                }
            }
            // What was written since is sealed as in a disk that never went back.
            disk.seal(false).unwrap();
            let before = content(&mut disk);
            disk.freeze(file(), false).unwrap();
            let merged = file();
            let header = disk.frozen(0).unwrap().export(&merged).unwrap();
            disk.replace_frozen(0, header, merged).unwrap();
            prop_assert_eq!(content(&mut disk), before);
        }
    }
}
