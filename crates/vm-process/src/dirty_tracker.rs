//! Tracks which pages of a VM's memory differ from its parent layers: the layers of its template,
//! or of the last snapshot of the VM that was kept.
//!
//! Besides, it tracks what differs from the position in the tree of checkpoints: the layers of the
//! checkpoint that the VM has last taken or was rewound to. The parent does not change while there
//! are checkpoints, so every checkpoint's layers can be compared with it.
//!
//! A clone that was never snapshotted is not tracked: its private pages are the ones that it
//! changed. The first snapshot that is kept starts the tracking, which later snapshots continue.

use std::sync::Arc;

use super::released::Released;
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
    /// The position in the tree of checkpoints, while there are any.
    position: Option<Position>,
    /// The pages that may not have the content of the position though nobody wrote them.
    released: Released,
}

/// The layers that the next checkpoint builds on, and what differs from them.
struct Position {
    /// `None` for RAM that was zero.
    stack: Option<LayerStack>,
    /// The pages known to have changed, besides those that the tracker has not reported yet.
    changed: PageSet,
}

/// The most layers of checkpoints over each other. Beyond, the next one is based on the mapped
/// layers again, and holds all that differs from them.
const MAX_DEPTH: usize = 16;

impl DirtyTracker {
    /// The tracker of a VM that has just been booted or forked.
    pub(super) fn new(memory: Arc<GuestMemory>, pagemap: Pagemap, released: Released) -> Self {
        let parent = memory.layers().cloned();
        Self {
            memory,
            pagemap,
            parent,
            tracker: None,
            changed: PageSet::new(),
            renewed: false,
            position: None,
            released,
        }
    }

    /// Records that the guest rebooted, and that the all-zero `memory` is its RAM now. The parent
    /// stays: the next snapshot may still be written as a difference from it.
    pub(super) fn renewed(&mut self, memory: Arc<GuestMemory>) {
        self.tracker = None;
        self.changed = PageSet::new();
        self.memory = memory;
        self.renewed = true;
        if let Some(position) = &mut self.position {
            *position = Position {
                stack: None,
                changed: PageSet::new(),
            };
        }
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
            if let Some(position) = &mut self.position {
                position.changed = position.changed.union(&self.changed);
            }
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
        if let Some(position) = &mut self.position {
            position.changed = position.changed.union(&now);
        }
        Ok(now)
    }

    /// Starts tracking changes for checkpoints. If there is no position yet, it is the mapped
    /// layers.
    ///
    /// # Errors
    /// Those of the host's kernel.
    pub(super) fn begin_position(&mut self) -> Result<(), DirtyError> {
        if self.position.is_none() {
            self.released.restart();
        }
        self.begin()?;
        if self.position.is_none() {
            // Pages that are written from now on are reported later.
            self.position = Some(Position {
                stack: self.memory.layers().cloned(),
                changed: self.memory.private_pages(&self.pagemap)?,
            });
        }
        Ok(())
    }

    /// The layers that the next checkpoint builds on, and the pages that it must hold.
    pub(super) fn checkpoint_base(&self) -> (Vec<Layer>, PageSet) {
        let mapped = self.memory.layers().map_or(&[][..], LayerStack::layers);
        let Some(position) = &self.position else {
            return (mapped.to_vec(), PageSet::new());
        };
        match &position.stack {
            None => (Vec::new(), position.changed.clone()),
            Some(stack) if stack.layers().len() < mapped.len() + MAX_DEPTH => {
                (stack.layers().to_vec(), position.changed.clone())
            }
            Some(stack) => {
                let above = stack.pages_above(mapped.len());
                (mapped.to_vec(), position.changed.union(&above))
            }
        }
    }

    /// Records that the VM is at a checkpoint with these layers.
    pub(super) fn checkpointed(&mut self, stack: LayerStack) {
        self.position = Some(Position {
            stack: Some(stack),
            changed: PageSet::new(),
        });
    }

    /// Records that there are no checkpoints any more.
    pub(super) fn forget_position(&mut self) {
        self.position = None;
        self.released.stop();
    }

    /// The pages that may differ from `target`, whose lowest layers are the mapped ones: those that
    /// changed, those that the position and the target have from different layers, and those of the
    /// target that were given back to the host since (by the balloon, or as free pages).
    ///
    /// # Errors
    /// Those of the host's kernel.
    pub(super) fn differing_from(&mut self, target: &LayerStack) -> Result<PageSet, DirtyError> {
        self.begin_position()?;
        let mapped = self.memory.layers().map_or(0, |it| it.layers().len());
        let given_back = self.released.pages();
        let given_back = given_back.intersection(&target.pages_above(mapped));
        let Some(position) = &self.position else {
            return Ok(given_back);
        };
        let other_layers = target.difference(position.stack.as_ref());
        Ok(position.changed.union(&other_layers).union(&given_back))
    }

    /// Prepares `pages` to be put back. Until [`DirtyTracker::rewound`], they count as changed, and as
    /// given back where they are dropped.
    ///
    /// # Errors
    /// Those of the host's kernel.
    pub(super) fn prepare(&self, pages: &PageSet) -> Result<(), DirtyError> {
        self.released.add(pages);
        match &self.tracker {
            Some(tracker) => tracker.unprotect(pages),
            None => Ok(()),
        }
    }

    /// Records that RAM has the content of `target`, where `put_back` are the pages that it was
    /// given for that.
    ///
    /// # Errors
    /// Those of the host's kernel. Changes are not tracked then, and RAM must be put back again.
    pub(super) fn rewound(
        &mut self,
        target: LayerStack,
        put_back: &PageSet,
    ) -> Result<(), DirtyError> {
        match &self.tracker {
            Some(tracker) => tracker.take_as_unchanged(put_back)?,
            None => {
                let tracker = ChangeTracker::new(&self.memory, self.pagemap.try_clone()?)?;
                tracker.arm()?;
                self.tracker = Some(tracker);
            }
        }
        self.changed = target.difference(self.parent.as_ref());
        self.renewed = false;
        self.checkpointed(target);
        self.released.restart();
        Ok(())
    }

    /// Records that RAM was mapped anew as `memory`, before it is put back.
    pub(super) fn remapped(&mut self, memory: Arc<GuestMemory>) {
        self.tracker = None;
        self.memory = memory;
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
        let parent = self.parent.as_ref();
        let above = parent.map(|stack| stack.pages_above(base));
        self.changed.union(&above.unwrap_or_default())
    }

    /// The pages that the parent has data for.
    fn parents_data(&self) -> PageSet {
        let parent = self.parent.as_ref();
        parent.map(LayerStack::pages_with_data).unwrap_or_default()
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
    /// run before that snapshot, or checkpoints need it.
    pub(super) fn not_kept(&mut self, was_tracked: bool) {
        if !was_tracked && self.position.is_none() {
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
    use clone_memory::layout::PAGE_SIZE;
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
        let mut dirty_tracker = DirtyTracker::new(
            Arc::clone(&memory),
            Pagemap::open().unwrap(),
            Released::default(),
        );
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
