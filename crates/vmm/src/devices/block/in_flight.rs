//! The requests that the disk is working on, by the tags under which it completes them.

use vm_memory::GuestAddress;

/// A request of the guest that the disk is working on.
pub(super) struct Pending {
    /// The queue's place in the list of active queues.
    pub(super) slot: usize,
    /// The chain's head, for the used ring.
    pub(super) head: u16,
    /// The address of the status byte.
    pub(super) status: GuestAddress,
    /// The bytes that the device writes if the request succeeds, with the status byte.
    pub(super) written: u32,
    /// The bytes of the request's data.
    pub(super) bytes: u64,
    /// Whether a flush must follow before the answer.
    pub(super) flush: bool,
}

/// All requests that the disk is working on.
#[derive(Default)]
pub(super) struct InFlight {
    requests: Vec<Option<Pending>>,
    free: Vec<usize>,
    bytes: u64,
}

impl InFlight {
    /// The number of requests.
    pub(super) fn len(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    /// The bytes of all requests.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds a request and returns its tag.
    pub(super) fn insert(&mut self, pending: Pending) -> u64 {
        self.bytes += pending.bytes;
        if let Some(index) = self.free.pop() {
            self.requests[index] = Some(pending);
            return index as u64;
        }
        self.requests.push(Some(pending));
        self.requests.len() as u64 - 1
    }

    /// Whether a flush must follow the request. Further calls return `false`.
    pub(super) fn take_flush(&mut self, tag: u64) -> bool {
        let request = self.requests.get_mut(tag as usize).and_then(Option::as_mut);
        request.is_some_and(|pending| std::mem::take(&mut pending.flush))
    }

    /// Removes a request that is complete.
    pub(super) fn remove(&mut self, tag: u64) -> Option<Pending> {
        let pending = self.requests.get_mut(tag as usize)?.take()?;
        self.free.push(tag as usize);
        self.bytes -= pending.bytes;
        Some(pending)
    }
}
