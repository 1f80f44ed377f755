//! Making one layer of several.

use std::fs::File;

use crate::layer_writer::{Checksums, LayerWriter};
use crate::layers::format::{CHUNK_PAGES, Extent, pages_with};
use crate::layers::{Content, Layer, LayerError, LayerStack, Source};
use crate::layout::PAGE_SIZE;
use crate::pages::PageSet;

/// A layer made of several overrides at most so many runs of pages if that can be had by taking
/// pages between them from below: pages that are then no longer shared with the layers below.
const TARGET_RUNS: usize = 512;

impl LayerStack {
    /// Writes one layer that stands for all layers from `keep` up: with 0 a base, else a layer that
    /// lies on layer `keep - 1`, which goes on being shared with others. The content seen through
    /// the stack is the same. Layers are not verified by this.
    ///
    /// # Errors
    /// As [`LayerWriter::new`] and [`LayerWriter::finish`].
    ///
    /// # Panics
    /// If `keep` is not below the number of layers.
    pub fn flatten(
        &self,
        keep: usize,
        file: File,
        name: impl Into<String>,
    ) -> Result<Layer, LayerError> {
        assert!(keep < self.layers().len(), "nothing to flatten");
        let parent = keep.checked_sub(1).map(|below| self.layers()[below].id());
        let mut writer = LayerWriter::new(file, name, *self.layout(), parent)?;
        let overridden = self.overridden(keep);
        let zeros = self
            .pieces()
            .iter()
            .filter(|piece| piece.source == Source::Zero);
        let zeros: PageSet = zeros.map(|piece| piece.pages.clone()).collect();
        writer.zero(&overridden.intersection(&zeros))?;
        let mut buffer = Vec::new();
        for run in overridden.difference(&zeros).runs() {
            for first in run.clone().step_by(CHUNK_PAGES as usize) {
                let pages = CHUNK_PAGES.min(run.end - first);
                buffer.resize((pages * PAGE_SIZE) as usize, 0);
                self.read(first, &mut buffer)?;
                writer.write(first, &buffer)?;
            }
        }
        writer.finish(Checksums::Yes)
    }

    /// The pages that layers from `keep` up override, and as many between them as it takes for few
    /// runs. A base needs no such bridges: between its pages there is nothing but zeros.
    fn overridden(&self, keep: usize) -> PageSet {
        let pages_of = |extents: &[Extent]| {
            pages_with(extents, Content::Data).union(&pages_with(extents, Content::Zero))
        };
        let layers = self.layers()[keep..].iter();
        let overridden = layers.fold(PageSet::new(), |all, layer| {
            all.union(&pages_of(layer.extents()))
        });
        match keep {
            0 => overridden,
            _ => overridden.bridged_to(TARGET_RUNS),
        }
    }
}
