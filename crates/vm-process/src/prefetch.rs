//! Prefetch: the pages that a template's clones touch first are recorded once, and mapped in
//! advance for every later clone.
//!
//! Each page that a clone first touches costs a fault in the host and another one in KVM, which
//! together are most of the time to a clone's first answer. The record is only advice: if it is
//! missing or wrong, clones are slower but correct.

use std::fs::File;
use std::io::Read;

use clone_api::control::TouchedPages;
use clone_memory::layout::PAGE_SIZE;
use clone_memory::{GuestMemory, PageSet};

/// The size limit of a record, in bytes.
const MAX_BYTES: u64 = 4 << 20;
/// The most runs of pages in a record, since each run costs a call at every fork.
const MAX_RUNS: usize = 2048;
/// Runs at most this many pages apart are mapped as one, which costs less than another call.
const NEARBY: u64 = 4;

/// The pages to map in advance, as sets within RAM.
pub(super) struct PrefetchPages {
    read: PageSet,
    written: PageSet,
}

/// Reads a record and cuts it to the size of `memory`. `None` if it cannot be read.
pub(super) fn read(file: File, memory: &GuestMemory) -> Option<PrefetchPages> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    match serde_json::from_slice::<TouchedPages>(&bytes) {
        Ok(record) => {
            let pages = memory.layout().size() / PAGE_SIZE;
            Some(PrefetchPages {
                read: set(&record.read, pages).bridged(NEARBY),
                written: set(&record.written, pages),
            })
        }
        Err(error) => {
            tracing::warn!(%error, "nothing is brought in ahead");
            None
        }
    }
}

impl PrefetchPages {
    /// Maps the pages into this process; those that the clone will write become private copies.
    pub(super) fn map(&self, memory: &GuestMemory) {
        let mapped = memory
            .prefetch(&self.read)
            .and_then(|()| memory.prefetch_for_writing(&self.written));
        if let Err(error) = mapped {
            tracing::warn!(%error, "not everything is brought in ahead");
        }
    }

    /// All pages, for KVM to map.
    pub(super) fn all(&self) -> PageSet {
        let all = self.read.union(&self.written);
        all.bridged(NEARBY).bridged_to(MAX_RUNS)
    }
}

/// Converts a record's runs to a set, cut to RAM of `pages` pages. Runs that are not in ascending
/// order are ignored, since a set cannot have them.
fn set(runs: &[(u64, u64)], pages: u64) -> PageSet {
    let mut set = PageSet::new();
    let mut end = 0;
    for &(first, after) in runs {
        let run = first.max(end)..after.min(pages);
        if !run.is_empty() {
            end = run.end;
            set.append(run);
        }
    }
    set
}

/// Converts a set to a record's runs.
pub(super) fn runs(set: &PageSet) -> Vec<(u64, u64)> {
    let set = set.bridged_to(MAX_RUNS);
    set.runs().iter().map(|run| (run.start, run.end)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_from_a_hostile_hand_stays_within_ram() {
        let wild = [(5, 3), (2, 4), (3, 9), (8, u64::MAX), (1, 2), (u64::MAX, 7)];
        let set = set(&wild, 20);
        assert_eq!(runs(&set), [(2, 20)]);
    }
}
