//! The guest's requests that the server or a worker has, and the files that are open.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use vm_memory::GuestAddress;

use super::queue::{FileRequest, RamSlice, SharedFile};

/// The most descriptors of files that are kept. The server is asked again for others.
const MAX_FILES: usize = 1024;

/// A request that is not answered yet.
pub(super) struct Pending {
    /// The queue's place in the list of active queues.
    pub(super) slot: usize,
    pub(super) head: u16,
    /// The guest's number of the request.
    pub(super) unique: u64,
    /// The room for the answer's header and its body, but for the content of a file.
    pub(super) room: Vec<(GuestAddress, usize)>,
    pub(super) work: Work,
}

/// Who has the request.
pub(super) enum Work {
    /// The server, since then. `opens` is set for requests whose answer has the handle of a file at
    /// this place of the body.
    Server {
        since: Instant,
        opens: Option<usize>,
    },
    /// The server is asked for a descriptor of the file first.
    File {
        since: Instant,
        request: FileRequest,
        data: Vec<RamSlice>,
        file: Option<SharedFile>,
    },
    /// A worker.
    Worker,
}

impl Work {
    /// Since when the server is waited for.
    pub(super) fn waits_since(&self) -> Option<Instant> {
        match self {
            Self::Server { since, .. } | Self::File { since, .. } => Some(*since),
            Self::Worker => None,
        }
    }
}

/// The open files by their handles. What was opened first is dropped first.
#[derive(Default)]
pub(super) struct Files {
    files: HashMap<u64, SharedFile>,
    order: VecDeque<u64>,
}

impl Files {
    pub(super) fn get(&self, handle: u64) -> Option<SharedFile> {
        self.files.get(&handle).cloned()
    }

    pub(super) fn insert(&mut self, handle: u64, file: SharedFile) {
        if self.files.insert(handle, file).is_none() {
            self.order.push_back(handle);
        }
        while self.order.len() > MAX_FILES {
            if let Some(oldest) = self.order.pop_front() {
                self.files.remove(&oldest);
            }
        }
    }

    pub(super) fn remove(&mut self, handle: u64) {
        if self.files.remove(&handle).is_some() {
            self.order.retain(|other| *other != handle);
        }
    }

    pub(super) fn clear(&mut self) {
        self.files.clear();
        self.order.clear();
    }
}
