//! Records which pages the guest has given back to the host, by the balloon or as free pages, while
//! the VM has checkpoints: what is seen there is not what a checkpoint has, though nobody wrote it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clone_memory::layout::PAGE_SIZE;
use clone_memory::{PageSet, RamLayout};
use clone_vmm::devices::balloon::{DiscardRam, GuestRange, ReleaseRanges};

/// The most runs of pages that are kept apart. With more, pages between are taken for released, which
/// only makes a rewind read them.
const MAX_RUNS: usize = 4096;

/// The record, shared by the balloon and the tracker of changes. Each locks it for a moment, the
/// balloon on the event loop, the tracker on the thread of a checkpoint or a rewind.
#[derive(Clone, Default)]
pub(super) struct Released(Arc<Mutex<Option<PageSet>>>);

impl Released {
    fn lock(&self) -> MutexGuard<'_, Option<PageSet>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records from now on, beginning with nothing.
    pub(super) fn restart(&self) {
        *self.lock() = Some(PageSet::new());
    }

    /// Records nothing any more.
    pub(super) fn stop(&self) {
        *self.lock() = None;
    }

    /// Adds pages, if there is a record.
    pub(super) fn add(&self, pages: &PageSet) {
        if let Some(released) = &mut *self.lock() {
            *released = released.union(pages).bridged_to(MAX_RUNS);
        }
    }

    /// The pages that were released.
    pub(super) fn pages(&self) -> PageSet {
        self.lock().clone().unwrap_or_default()
    }
}

/// Releases memory, after recording it.
pub(super) struct RecordedDiscard {
    pub(super) discard: DiscardRam,
    pub(super) released: Released,
    pub(super) layout: RamLayout,
}

impl ReleaseRanges for RecordedDiscard {
    fn release(&mut self, ranges: &[GuestRange]) -> io::Result<()> {
        let runs = ranges.iter().filter_map(|range| {
            // Ranges lie within RAM, and none is on both sides of the PCI hole.
            let first = self.layout.offset_of(range.start)? / PAGE_SIZE;
            Some(first..first + range.len / PAGE_SIZE)
        });
        self.released.add(&runs.collect());
        self.discard.release(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clone_memory::GuestMemory;
    use clone_memory::layout::PCI_HOLE_END;
    use vm_memory::GuestAddress;

    #[test]
    fn what_is_released_is_recorded_by_its_place_in_ram_and_within_bounds() {
        let layout = RamLayout::new((3 << 30) + (64 << 20)).unwrap();
        let memory = GuestMemory::anonymous(&layout).unwrap();
        let released = Released::default();
        let mut discard = RecordedDiscard {
            discard: DiscardRam::new(memory.ram().clone()),
            released: released.clone(),
            layout,
        };
        let range = |start: u64, pages: u64| GuestRange {
            start: GuestAddress(start),
            len: pages * PAGE_SIZE,
        };
        discard.release(&[range(0, 1)]).unwrap();
        assert!(released.pages().is_empty(), "nobody asked for it");
        released.restart();
        let ranges = [range(5 * PAGE_SIZE, 2), range(PCI_HOLE_END, 1)];
        discard.release(&ranges).unwrap();
        let above = (3 << 30) / PAGE_SIZE;
        let expected: PageSet = [5..7, above..above + 1].into_iter().collect();
        assert_eq!(released.pages(), expected);
        for page in 0..2 * MAX_RUNS as u64 {
            discard.release(&[range(2 * page * PAGE_SIZE, 1)]).unwrap();
        }
        assert!(released.pages().runs().len() <= MAX_RUNS);
        assert!(released.pages().contains(2 * MAX_RUNS as u64));
        released.stop();
        assert!(released.pages().is_empty());
    }
}
