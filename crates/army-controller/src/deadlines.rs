//! How long nodes may take.

use std::time::Duration;

use army_node_api::{Call, Deadline, NodeApi};

/// The limit of an operation on VMs or templates of one host.
const OPERATION: Duration = Duration::from_secs(300);
/// What each VM of a request adds to the limit of its creation.
const EACH_VM: Duration = Duration::from_secs(1);
/// The limit of operations that write or send all of a template.
const TRANSFER: Duration = Duration::from_secs(3600);
/// The limit of an export, whose client may be slow.
const EXPORT: Duration = Duration::from_secs(24 * 3600);
/// The limit of ending a VM in the task of its host, which tries again.
const DESTRUCTION: Duration = Duration::from_secs(10);
/// The limit of telling a host where a VM is that was being moved. A VM's process may have to end.
const DECISION: Duration = Duration::from_secs(60);
/// The limit of connecting with a guest's agent. After a fork, the agent first takes back its
/// connections.
const AGENT: Duration = Duration::from_secs(20);
/// The limit of short questions to a host elsewhere.
const QUESTION: Duration = Duration::from_secs(8);

/// A call with this limit. [`Fenced`](crate::fenced::Fenced) adds the epoch of its host.
fn after(limit: Duration) -> Call {
    Deadline::after(limit).into()
}

pub(crate) fn operation() -> Call {
    after(OPERATION)
}

pub(crate) fn creation(vms: usize) -> Call {
    let each = EACH_VM.saturating_mul(u32::try_from(vms).unwrap_or(u32::MAX));
    after(OPERATION.saturating_add(each))
}

pub(crate) fn transfer() -> Call {
    after(TRANSFER)
}

pub(crate) fn export() -> Call {
    after(EXPORT)
}

pub(crate) fn destruction() -> Call {
    after(DESTRUCTION)
}

pub(crate) fn decision() -> Call {
    after(DECISION)
}

pub(crate) fn agent() -> Deadline {
    Deadline::after(AGENT)
}

/// A node in this process is not unreachable: what takes it long is the number of its VMs.
pub(crate) fn question(node: &dyn NodeApi) -> Call {
    match node.address() {
        Some(_) => after(QUESTION),
        None => operation(),
    }
}
