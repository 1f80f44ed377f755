//! Stacks of layers, and the memory that a stack gives.

use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::format::Content;
use super::{Layer, LayerError};
use crate::layout::{PAGE_SIZE, RamLayout};

/// The most mappings of a stack; one that needs more must be flattened first. A process may have
/// 65,530 (`vm.max_map_count`), and each mapping makes a fork slower.
pub const MAX_MAPPINGS: usize = 4096;

/// The source of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// No layer, or a layer that zeroed them.
    Zero,
    /// The data of the layer of this index, from the bottom.
    Layer(usize),
}

/// Neighbouring pages from one source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The page numbers.
    pub pages: Range<u64>,
    /// The source of the pages.
    pub source: Source,
}

/// A stack of layers that were made for each other, from the base up.
#[derive(Clone, Debug)]
pub struct LayerStack {
    layers: Vec<Layer>,
    pieces: Vec<Piece>,
}

impl LayerStack {
    /// Makes a stack of layers, the base first.
    ///
    /// # Errors
    /// [`LayerError::Parent`] if one is missing, swapped or of another stack;
    /// [`LayerError::RamSize`]; [`LayerError::NoLayer`].
    pub fn new(layers: Vec<Layer>) -> Result<Self, LayerError> {
        let Some(layout) = layers.first().map(|base| *base.layout()) else {
            return Err(LayerError::NoLayer);
        };
        let mut below = None;
        for layer in &layers {
            if layer.layout() != &layout {
                return Err(LayerError::RamSize {
                    layer: layer.name().to_owned(),
                    wanted: layout.size(),
                    found: layer.layout().size(),
                });
            }
            if layer.parent() != below {
                return Err(LayerError::Parent {
                    layer: layer.name().to_owned(),
                    wanted: layer.parent(),
                    found: below,
                });
            }
            below = Some(layer.id());
        }
        let nothing = vec![Piece {
            pages: 0..layout.size() / PAGE_SIZE,
            source: Source::Zero,
        }];
        let pieces = (0..layers.len()).fold(nothing, |below, index| {
            overlaid(&below, &layers[index], index)
        });
        Ok(Self { layers, pieces })
    }

    /// The layers, the base first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The top layer, which is the parent of a new one.
    pub fn top(&self) -> &Layer {
        &self.layers[self.layers.len() - 1]
    }

    /// The layout of the RAM.
    pub fn layout(&self) -> &RamLayout {
        self.top().layout()
    }

    /// All of RAM as pieces from one source each, ascending. No two neighbours have the same
    /// source.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Whether mapping the stack takes more than [`MAX_MAPPINGS`] mappings.
    pub fn needs_flatten(&self) -> bool {
        self.pieces.len() > MAX_MAPPINGS
    }

    /// Reads pages as a clone sees them. The length of `bytes` must be a multiple of the page size,
    /// and the pages within RAM.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub fn read(&self, first: u64, bytes: &mut [u8]) -> Result<(), LayerError> {
        let end = first + bytes.len() as u64 / PAGE_SIZE;
        let from = self
            .pieces
            .partition_point(|piece| piece.pages.end <= first);
        for piece in &self.pieces[from..] {
            let pages = piece.pages.start.max(first)..piece.pages.end.min(end);
            if pages.is_empty() {
                break;
            }
            let at = |page: u64| ((page - first) * PAGE_SIZE) as usize;
            let part = &mut bytes[at(pages.start)..at(pages.end)];
            match piece.source {
                Source::Zero => part.fill(0),
                Source::Layer(index) => {
                    let layer = &self.layers[index];
                    let read = layer.file().read_exact_at(part, pages.start * PAGE_SIZE);
                    read.map_err(|e| layer.io("read", e))?;
                }
            }
        }
        Ok(())
    }
}

/// The pieces after another layer is put on top.
fn overlaid(below: &[Piece], layer: &Layer, index: usize) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(below.len() + layer.extents().len());
    let mut rest = below.iter();
    let mut current = rest.next().cloned();
    for extent in layer.extents() {
        // Pieces, or their remainders, that start before the extent.
        while let Some(piece) = current.take_if(|piece| piece.pages.start < extent.pages.start) {
            push(
                &mut pieces,
                piece.pages.start..piece.pages.end.min(extent.pages.start),
                piece.source,
            );
            current = match piece.pages.end > extent.pages.start {
                true => Some(Piece {
                    pages: extent.pages.start..piece.pages.end,
                    ..piece
                }),
                false => rest.next().cloned(),
            };
        }
        let source = match extent.content {
            Content::Data => Source::Layer(index),
            Content::Zero => Source::Zero,
        };
        push(&mut pieces, extent.pages.clone(), source);
        // Pieces that the extent covers.
        while let Some(piece) = current.take_if(|piece| piece.pages.start < extent.pages.end) {
            current = match piece.pages.end > extent.pages.end {
                true => Some(Piece {
                    pages: extent.pages.end..piece.pages.end,
                    ..piece
                }),
                false => rest.next().cloned(),
            };
        }
    }
    for piece in current.into_iter().chain(rest.cloned()) {
        push(&mut pieces, piece.pages, piece.source);
    }
    pieces
}

fn push(pieces: &mut Vec<Piece>, pages: Range<u64>, source: Source) {
    match pieces.last_mut() {
        Some(last) if last.source == source => last.pages.end = pages.end,
        _ => pieces.push(Piece { pages, source }),
    }
}
