//! What a VM's memory has in common with layers that are kept: its template's, or those of the
//! last kept snapshot of it.
//!
//! A clone that was never snapshotted is not tracked: what it changed are its private pages. The
//! first kept snapshot starts tracking, and from then on what changed since is known.

use std::sync::Arc;

use clone_memory::layout::PAGE_SIZE;
use clone_memory::{
    ChangeTracker, DirtyError, GuestMemory, Layer, LayerError, LayerId, LayerStack, PageSet,
    Pagemap,
};

/// The lineage of one VM's memory.
pub(super) struct Lineage {
    memory: Arc<GuestMemory>,
    pagemap: Pagemap,
    /// What is kept; none for a VM that was booted and never snapshotted.
    parent: Option<LayerStack>,
    /// Finds what changes; from the first snapshot on, where that was kept.
    tracker: Option<ChangeTracker>,
    /// What is known to have changed since `parent`, beside what the tracker has yet to tell.
    changed: PageSet,
    /// Whether RAM was emptied since `parent`, by a reboot.
    renewed: bool,
}

impl Lineage {
    /// Of a VM that has just been booted or forked.
    pub(super) fn new(memory: Arc<GuestMemory>, pagemap: Pagemap) -> Self {
        let parent = memory.layers().cloned();
        Self {
            memory,
            pagemap,
            parent,
            tracker: None,
            changed: PageSet::new(),
            renewed: false,
        }
    }

    /// The guest rebooted: `memory` is its RAM now, all zero. What was kept is its past all the
    /// same: its next snapshot may be told as the difference.
    pub(super) fn renewed(&mut self, memory: Arc<GuestMemory>) {
        self.tracker = None;
        self.changed = PageSet::new();
        self.memory = memory;
        self.renewed = true;
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub(super) fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }

    /// The layer that a diff lies on.
    pub(super) fn parent_id(&self) -> Option<LayerId> {
        self.parent.as_ref().map(|stack| stack.top().id())
    }

    /// Starts to look for changes: gives all pages that differ from the parent.
    pub(super) fn begin(&mut self) -> Result<PageSet, DirtyError> {
        if self.tracker.is_some() {
            self.take_changed()?;
        } else {
            let tracker = ChangeTracker::new(&self.memory, self.pagemap.try_clone()?)?;
            self.changed = tracker.arm()?;
            if self.renewed {
                self.changed = self.changed.union(&self.parents_data());
            }
            self.tracker = Some(tracker);
        }
        Ok(self.changed.clone())
    }

    /// The pages that changed since the last call, or since [`Lineage::begin`].
    pub(super) fn take_changed(&mut self) -> Result<PageSet, DirtyError> {
        let Some(tracker) = &self.tracker else {
            return Ok(PageSet::new());
        };
        let now = tracker.take_changed()?;
        self.changed = self.changed.union(&now);
        Ok(now)
    }

    /// All pages that are not zero for sure: the parent's and those that changed.
    pub(super) fn all_data(&self) -> PageSet {
        match self.renewed {
            true => self.changed.clone(),
            false => self.parents_data().union(&self.changed),
        }
    }

    /// The pages that the parent has data for.
    fn parents_data(&self) -> PageSet {
        let pages = self.memory.layout().size() / PAGE_SIZE;
        let mut zero = PageSet::new();
        for piece in self.parent.iter().flat_map(LayerStack::pieces) {
            if piece.source == clone_memory::layers::Source::Zero {
                zero.append(piece.pages.clone());
            }
        }
        let all: PageSet = match self.parent {
            Some(_) => std::iter::once(0..pages).collect(),
            None => PageSet::new(),
        };
        all.difference(&zero)
    }

    /// A snapshot that is kept was taken: its layer is the parent of the next, over the present
    /// parent or (a full one) by itself.
    pub(super) fn kept(&mut self, layer: Layer, full: bool) -> Result<(), LayerError> {
        let mut layers = match &self.parent {
            Some(stack) if !full => stack.layers().to_vec(),
            _ => Vec::new(),
        };
        layers.push(layer);
        self.parent = Some(LayerStack::new(layers)?);
        self.changed = PageSet::new();
        self.renewed = false;
        Ok(())
    }

    /// A snapshot was taken that is not kept, or none: a VM that was not tracked before need not
    /// be from now on.
    pub(super) fn not_kept(&mut self, was_tracked: bool) {
        if !was_tracked {
            self.tracker = None;
            self.changed = PageSet::new();
        }
    }

    /// Whether changes are tracked.
    pub(super) fn is_tracked(&self) -> bool {
        self.tracker.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clone_memory::{Checksums, LayerWriter, RamLayout};
    use vm_memory::{Bytes, GuestAddress};

    fn layer(memory: &GuestMemory, parent: Option<LayerId>, pages: &PageSet) -> Layer {
        let file = tempfile::tempfile().unwrap();
        let mut writer = LayerWriter::new(file, "layer", *memory.layout(), parent).unwrap();
        writer.copy(memory, pages).unwrap();
        writer.finish(Checksums::Yes).unwrap()
    }

    fn content(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; memory.layout().size() as usize];
        memory
            .ram()
            .read_slice(&mut bytes, GuestAddress(0))
            .unwrap();
        bytes
    }

    #[test]
    fn the_difference_after_a_reboot_hides_all_that_the_parent_has() {
        let layout = RamLayout::new(1 << 20).unwrap();
        let pages = layout.size() / PAGE_SIZE;
        let template = GuestMemory::anonymous(&layout).unwrap();
        let address = |page: u64| GuestAddress(page * PAGE_SIZE);
        for page in [1, 2, 9] {
            template.ram().write_obj(page, address(page)).unwrap();
        }
        let base = layer(&template, None, &std::iter::once(0..pages).collect());
        let stack = LayerStack::new(vec![base.clone()]).unwrap();
        let memory = Arc::new(GuestMemory::from_layers(&layout, &stack).unwrap());
        memory.ram().write_obj(7_u64, address(4)).unwrap();
        let mut lineage = Lineage::new(Arc::clone(&memory), Pagemap::open().unwrap());
        assert_eq!(lineage.begin().unwrap(), std::iter::once(4..5).collect());

        lineage.renewed(Arc::new(memory.renewed().unwrap()));
        let memory = Arc::clone(lineage.memory());
        memory.ram().write_obj(5_u64, address(2)).unwrap();
        let changed = lineage.begin().unwrap();
        let diff = layer(&memory, lineage.parent_id(), &changed);
        let both = LayerStack::new(vec![base, diff]).unwrap();
        let forked = GuestMemory::from_layers(&layout, &both).unwrap();
        assert_eq!(content(&forked), content(&memory));
        let full = layer(&memory, None, &lineage.all_data());
        let alone = LayerStack::new(vec![full]).unwrap();
        let forked = GuestMemory::from_layers(&layout, &alone).unwrap();
        assert_eq!(content(&forked), content(&memory));
    }
}
