//! Puts the content of layers back into RAM in place, page by page.
//!
//! A page whose content is that of the mapped layers is dropped (`MADV_DONTNEED`), which costs no
//! copy and gives its memory back; others are read from the files. Which pages can differ is
//! decided by the caller, who tracks changes.

use std::ops::Range;

use rustix::mm::Advice;

use crate::layers::{Layer, LayerError, LayerStack, Source};
use crate::layout::PAGE_SIZE;
use crate::mapping::{GuestMemory, MemoryError};
use crate::pages::PageSet;

/// Pages of one layer at most this far apart are read with one call.
const NEARBY: u64 = 8;

/// The errors of putting content back. RAM has part of it then.
#[derive(Debug, thiserror::Error)]
pub enum PutBackError {
    /// The host refused to drop pages.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A layer cannot be read.
    #[error(transparent)]
    Layer(#[from] LayerError),
}

/// The pages that were put back, in numbers of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutBack {
    /// Pages that show the mapped layers again, or zero.
    pub dropped: u64,
    /// Pages that were read from layers which are not mapped.
    pub read: u64,
}

impl LayerStack {
    /// The pages whose content may differ between this stack and another of the same layout, or
    /// zeroed RAM: those that come from different layers. Nothing is read.
    pub fn difference(&self, other: Option<&Self>) -> PageSet {
        let all = 0..self.layout().size() / PAGE_SIZE;
        let ours = Sources::of(Some(self), all.clone());
        let theirs = Sources::of(other, all.clone());
        let mut different = PageSet::new();
        let mut at = all.start;
        let (mut ours, mut theirs) = (ours.peekable(), theirs.peekable());
        while let (Some((a, a_end)), Some((b, b_end))) = (ours.peek(), theirs.peek()) {
            let end = *a_end.min(b_end);
            if a != b {
                different.append(at..end);
            }
            let (a_ends, b_ends) = (*a_end == end, *b_end == end);
            if a_ends {
                ours.next();
            }
            if b_ends {
                theirs.next();
            }
            at = end;
        }
        different
    }

    /// The pages for which layers from number `base` on are seen, be it their data or their zeros.
    pub fn pages_above(&self, base: usize) -> PageSet {
        let above = self.layers().get(base..).unwrap_or_default().iter();
        above.fold(PageSet::new(), |all, layer| all.union(&layer.pages()))
    }
}

/// The sources of all pages, as layer ids (`None` for zero) and the ends of their runs.
struct Sources;

impl Sources {
    fn of(
        stack: Option<&LayerStack>,
        all: Range<u64>,
    ) -> Box<dyn Iterator<Item = (Option<crate::layers::LayerId>, u64)> + '_> {
        let Some(stack) = stack else {
            return Box::new(std::iter::once((None, all.end)));
        };
        Box::new(stack.pieces().iter().map(|piece| {
            let id = match piece.source {
                Source::Zero => None,
                Source::Layer(index) => Some(stack.layers()[index].id()),
            };
            (id, piece.pages.end)
        }))
    }
}

impl GuestMemory {
    /// Gives `pages` the content that they have in `stack`, whose lowest layers must be those that
    /// are mapped. All other pages have that content already, and a few between may be read again. Nobody may use these pages meanwhile.
    ///
    /// # Errors
    /// [`PutBackError`]; some pages have their new content then. It can be tried again.
    ///
    /// # Panics
    /// If `pages` reach beyond RAM.
    pub fn put_back(&self, stack: &LayerStack, pages: &PageSet) -> Result<PutBack, PutBackError> {
        let mapped = self.layers().map_or(&[][..], LayerStack::layers);
        let is_below = |(index, layer): (usize, &Layer)| {
            let below = stack.layers().get(index);
            below.is_some_and(|below| below.id() == layer.id())
        };
        if !mapped.iter().enumerate().all(is_below) {
            return Err(LayerError::Parent {
                layer: stack.top().name().to_owned(),
                wanted: stack.layers().first().map(Layer::id),
                found: mapped.last().map(Layer::id),
            }
            .into());
        }
        // Zeros of a layer above the mapped ones hide what these have.
        let hidden = match self.layers() {
            Some(below) => below.pages_with_data(),
            None => PageSet::new(),
        };
        let (mut drop, mut zero) = (PageSet::new(), PageSet::new());
        let mut read: Vec<(usize, Range<u64>)> = Vec::new();
        let mut last_piece = None;
        let mut pieces = stack.pieces();
        for run in pages.runs() {
            while let Some(piece) = pieces.first() {
                let here = run.start.max(piece.pages.start)..run.end.min(piece.pages.end);
                if !here.is_empty() {
                    // Pages between have their content already, and a call less is worth more.
                    let goes_on = last_piece == Some(piece.pages.start);
                    match (piece.source, read.last_mut()) {
                        (Source::Layer(index), _) if index < mapped.len() => drop.append(here),
                        (Source::Layer(_), Some((_, last)))
                            if goes_on && here.start - last.end <= NEARBY =>
                        {
                            last.end = here.end;
                        }
                        (Source::Layer(index), _) => read.push((index, here)),
                        (Source::Zero, _) => zero.append(here),
                    }
                    last_piece = Some(piece.pages.start);
                }
                if piece.pages.end > run.end {
                    break;
                }
                pieces = &pieces[1..];
            }
        }
        let overwrite = zero.intersection(&hidden);
        let drop = drop.union(&zero.difference(&hidden));
        for run in drop.runs() {
            let dropped = self.advise(run.clone(), Advice::LinuxDontNeed);
            dropped.map_err(|source| MemoryError::Advise {
                what: "drop pages of",
                source,
            })?;
        }
        for run in overwrite.runs() {
            for (_, host) in self.host_ranges(run.clone()) {
                host.zero(0..host.len());
            }
        }
        let mut read_pages = overwrite.pages();
        for (index, run) in read {
            let layer = &stack.layers()[index];
            read_pages += run.end - run.start;
            for (part, host) in self.host_ranges(run) {
                host.read_from(0..host.len(), layer.file(), part.start * PAGE_SIZE)
                    .map_err(|source| LayerError::Io {
                        what: "read",
                        layer: layer.name().to_owned(),
                        source,
                    })?;
            }
        }
        Ok(PutBack {
            dropped: drop.pages(),
            read: read_pages,
        })
    }
}

impl LayerStack {
    /// The pages for which some layer's data is seen.
    pub fn pages_with_data(&self) -> PageSet {
        let pieces = self.pieces().iter();
        let data = pieces.filter(|piece| piece.source != Source::Zero);
        data.map(|piece| piece.pages.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
