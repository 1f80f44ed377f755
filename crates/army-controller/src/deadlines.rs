//! How long nodes may take.

use std::time::Duration;

use army_node_api::{Deadline, NodeApi};

/// The limit of an operation on VMs or templates of one host.
const OPERATION: Duration = Duration::from_secs(300);
/// What each VM of a request adds to the limit of its creation.
const EACH_VM: Duration = Duration::from_secs(1);
/// The limit of operations that write or send all of a template.
const TRANSFER: Duration = Duration::from_secs(3600);
/// The limit of an export, whose client may be slow.
const EXPORT: Duration = Duration::from_secs(24 * 3600);
/// The limit of connecting with a guest's agent. After a fork, the agent first takes back its
/// connections.
const AGENT: Duration = Duration::from_secs(20);
/// The limit of short questions to a host elsewhere. One host that does not answer holds up the
/// next round of reports of all.
const QUESTION: Duration = Duration::from_secs(8);

pub(crate) fn operation() -> Deadline {
    Deadline::after(OPERATION)
}

pub(crate) fn creation(vms: usize) -> Deadline {
    let each = EACH_VM.saturating_mul(u32::try_from(vms).unwrap_or(u32::MAX));
    Deadline::after(OPERATION.saturating_add(each))
}

pub(crate) fn transfer() -> Deadline {
    Deadline::after(TRANSFER)
}

pub(crate) fn export() -> Deadline {
    Deadline::after(EXPORT)
}

pub(crate) fn agent() -> Deadline {
    Deadline::after(AGENT)
}

/// A node in this process is not unreachable: what takes it long is the number of its VMs.
pub(crate) fn question(node: &dyn NodeApi) -> Deadline {
    match node.address() {
        Some(_) => Deadline::after(QUESTION),
        None => operation(),
    }
}
