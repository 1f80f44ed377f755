//! The pages that a template's clones touch first: recorded once, brought in ahead from then on.
//!
//! What a clone does right after its start costs a fault for each page, in the host and once more
//! in KVM, which is most of the time to its first answer. The record is only advice: where it is
//! missing or wrong nothing but speed is lost.

use std::fs::File;
use std::io::Read;

use clone_api::control::TouchedPages;
use clone_memory::layout::PAGE_SIZE;
use clone_memory::{GuestMemory, PageSet};

/// The largest record that is read.
const MAX_BYTES: u64 = 4 << 20;
/// A record has no more runs than this: each costs a call at every fork.
const MAX_RUNS: usize = 2048;
/// Runs so many pages apart are brought in as one: that costs less than another call.
const NEARBY: u64 = 4;

/// Pages that will be needed, as sets within RAM.
pub(super) struct Needed {
    read: PageSet,
    written: PageSet,
}

/// Reads a record, for RAM of so many pages. Nothing where it cannot be read.
pub(super) fn read(file: File, memory: &GuestMemory) -> Option<Needed> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    match serde_json::from_slice::<TouchedPages>(&bytes) {
        Ok(record) => {
            let pages = memory.layout().size() / PAGE_SIZE;
            Some(Needed {
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

impl Needed {
    /// Maps the pages into this process: those that will be written as copies of its own.
    pub(super) fn map(&self, memory: &GuestMemory) {
        let mapped = memory
            .prefetch(&self.read)
            .and_then(|()| memory.prefetch_for_writing(&self.written));
        if let Err(error) = mapped {
            tracing::warn!(%error, "not everything is brought in ahead");
        }
    }

    /// All of it, for KVM to map.
    pub(super) fn all(&self) -> PageSet {
        let all = self.read.union(&self.written);
        all.bridged(NEARBY).bridged_to(MAX_RUNS)
    }
}

/// A record's runs as a set, cut to RAM of so many pages. Runs that are not ascending are left
/// out: a set has none.
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

/// A set's runs, for a record.
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
