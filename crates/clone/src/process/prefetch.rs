//! The pages that a template's clones touch first: recorded once, brought in ahead from then on.
//!
//! What a clone does right after its start costs a fault for each page, which is most of the time
//! to its first answer. The record is only advice: where it is missing or wrong nothing but speed
//! is lost.

use std::fs::File;
use std::io::Read;

use clone_memory::layout::PAGE_SIZE;
use clone_memory::{GuestMemory, PageSet};
use serde::{Deserialize, Serialize};

/// The largest record that is read.
const MAX_BYTES: u64 = 1 << 20;

/// Pages by what a clone does with them: runs of page numbers, each its first and the one after
/// its last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Pages that it reads.
    pub read: Vec<(u64, u64)>,
    /// Pages that it writes, and so will have a copy of.
    pub written: Vec<(u64, u64)>,
}

impl Record {
    /// The runs as a set, cut to RAM of so many pages.
    fn set(runs: &[(u64, u64)], pages: u64) -> PageSet {
        let runs = runs
            .iter()
            .map(|&(first, end)| first.min(pages)..end.min(pages));
        runs.filter(|run| !run.is_empty()).collect()
    }
}

/// Brings in what `file` has recorded.
pub(super) fn bring_in(memory: &GuestMemory, file: File) {
    let mut bytes = Vec::new();
    let record = match file.take(MAX_BYTES).read_to_end(&mut bytes) {
        Ok(_) => postcard::from_bytes::<Record>(&bytes).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let done = record.and_then(|record| {
        let pages = memory.layout().size() / PAGE_SIZE;
        memory
            .prefetch(&Record::set(&record.read, pages))
            .and_then(|()| memory.prefetch_for_writing(&Record::set(&record.written, pages)))
            .map_err(|error| error.to_string())
    });
    if let Err(error) = done {
        tracing::warn!(error, "nothing is brought in ahead");
    }
}
