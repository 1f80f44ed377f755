//! Limits that an operator sets.

/// Limits that an operator sets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// How much nominal memory the VMs of a host may have together, as a multiple of the host's
    /// memory. Without it, VMs are limited by the memory that they use, of which clones share most.
    pub memory_promise: Option<f64>,
}

impl Limits {
    /// The most nominal memory of the VMs on a host, in bytes.
    pub(crate) fn promise_limit(&self, memory_bytes: u64) -> Option<u64> {
        // A host that was never measured has no memory and no limit.
        let factor = self.memory_promise.filter(|_| memory_bytes > 0)?;
        Some((memory_bytes as f64 * factor) as u64)
    }
}
