//! Tracks which pages of a VM's memory differ from its parent layers: the layers of its template,
//! or of the last snapshot of the VM that was kept.
//!
//! A clone that was never snapshotted is not tracked: its private pages are the ones that it
//! changed. The first snapshot that is kept starts the tracking, which later snapshots continue.

use std::sync::Arc;

use clone_memory::layout::PAGE_SIZE;
use clone_memory::{
    ChangeTracker, DirtyError, GuestMemory, Layer, LayerError, LayerId, LayerStack, PageSet,
    Pagemap,
};

/// Tracks the changed pages of one VM's memory.
pub(super) struct DirtyTracker {
    memory: Arc<GuestMemory>,
    pagemap: Pagemap,
    /// The layers that a diff builds on; `None` for a VM that was booted and never snapshotted.
    parent: Option<LayerStack>,
    /// Detects changes; present from the first snapshot on, where that was kept.
    tracker: Option<ChangeTracker>,
    /// The pages known to have changed since `parent`, besides those that `tracker` has not
    /// reported yet.
    changed: PageSet,
    /// Whether a reboot replaced RAM by zero pages since `parent`.
    renewed: bool,
}

impl DirtyTracker {
    /// The tracker of a VM that has just been booted or forked.
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

    /// Records that the guest rebooted, and that the all-zero `memory` is its RAM now. The parent
    /// stays: the next snapshot may still be written as a difference from it.
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

    /// The number of layers of the parent.
    pub(super) fn parent_layers(&self) -> usize {
        self.layers().len()
    }

    /// The id of the top one of the parent's lowest `base` layers.
    pub(super) fn layer_id(&self, base: usize) -> Option<LayerId> {
        self.layers()[..base].last().map(Layer::id)
    }

    fn layers(&self) -> &[Layer] {
        self.parent.as_ref().map_or(&[], LayerStack::layers)
    }

    /// Starts tracking changes, and returns all pages that differ from the parent.
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

    /// The pages that changed since the last call, or since [`DirtyTracker::begin`].
    pub(super) fn take_changed(&mut self) -> Result<PageSet, DirtyError> {
        let Some(tracker) = &self.tracker else {
            return Ok(PageSet::new());
        };
        let now = tracker.take_changed()?;
        self.changed = self.changed.union(&now);
        Ok(now)
    }

    /// The pages that may differ from the parent's lowest `base` layers: those that the layers
    /// above them override, and those that changed since. With `base` 0, these are all pages that
    /// may have data.
    pub(super) fn changed_since(&self, base: usize) -> PageSet {
        if base == 0 {
            return match self.renewed {
                true => self.changed.clone(),
                false => self.parents_data().union(&self.changed),
            };
        }
        let above = self.layers()[base..].iter().map(Layer::pages);
        above.fold(self.changed.clone(), |all, pages| all.union(&pages))
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

    /// Records a snapshot that is kept: `layer` becomes the parent of the next snapshot, on top of
    /// the lowest `base` layers of the present parent.
    pub(super) fn kept(&mut self, layer: Layer, base: usize) -> Result<(), LayerError> {
        let mut layers = self.layers()[..base].to_vec();
        layers.push(layer);
        self.parent = Some(LayerStack::new(layers)?);
        self.changed = PageSet::new();
        self.renewed = false;
        Ok(())
    }

    /// Records that the snapshot failed or is not kept. Tracking stops again unless it had already
    /// run before that snapshot.
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
        let mut dirty_tracker = DirtyTracker::new(Arc::clone(&memory), Pagemap::open().unwrap());
        assert_eq!(
            dirty_tracker.begin().unwrap(),
            std::iter::once(4..5).collect()
        );

        dirty_tracker.renewed(Arc::new(memory.renewed().unwrap()));
        let memory = Arc::clone(dirty_tracker.memory());
        memory.ram().write_obj(5_u64, address(2)).unwrap();
        let changed = dirty_tracker.begin().unwrap();
        let diff = layer(&memory, dirty_tracker.layer_id(1), &changed);
        let both = LayerStack::new(vec![base, diff]).unwrap();
        let forked = GuestMemory::from_layers(&layout, &both).unwrap();
        assert_eq!(content(&forked), content(&memory));
        let full = layer(&memory, None, &dirty_tracker.changed_since(0));
        let alone = LayerStack::new(vec![full]).unwrap();
        let forked = GuestMemory::from_layers(&layout, &alone).unwrap();
        assert_eq!(content(&forked), content(&memory));
    }
}
