//! What the controller is told of a host and its VMs, about once a second.
//!
//! Asking a VM wakes its process and has it walk its page tables. So one of which nothing new is
//! known is asked now and then, and what it said is told again meanwhile.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use army_api::hosts::{Capacity, MissingJailLayer};
use army_api::vms::{VmMemory, VmState};
use clone::runtime::RunningVm;
use clone_api::control::VmState as Machine;
use clone_api::jail::JailStatus;
use clone_api::{Client, ClientError};

use super::journal::{Entry, Stage};
use super::{Node, capacity, lock};
use army_node_api::requests::{HostReport, VmReport};

/// What a VM said is told for so long.
const FRESH: Duration = Duration::from_secs(5);
/// How long a VM's process may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

impl Node {
    /// What the controller is told: the host and all that the journal knows.
    pub fn report(&self) -> HostReport {
        let templates = self.store.path("x").unwrap_or_default();
        let mut capacity = capacity::measure(&templates);
        let entries = self.journal.all();
        let vms: Vec<VmReport> = entries
            .iter()
            .map(|entry| self.report_one(entry, &mut capacity))
            .collect();
        self.seen.keep(&vms);
        HostReport {
            capacity,
            missing_jail_layers: self.jail.get().map(missing_layers).unwrap_or_default(),
            vms,
            ready: self.standbys.ready(),
            cpu: self.cpu.clone(),
        }
    }

    fn report_one(&self, entry: &Entry, capacity: &mut Capacity) -> VmReport {
        let mut report = VmReport {
            id: entry.id.clone(),
            state: VmState::Creating,
            reason: None,
            memory: None,
        };
        match &entry.stage {
            Stage::Begun => {}
            Stage::Ended(reason) => {
                report.state = VmState::Ended;
                report.reason = Some(reason.clone());
            }
            Stage::Failed(reason) => {
                report.state = VmState::Failed;
                report.reason = Some(reason.clone());
            }
            Stage::Running => {
                report.state = VmState::Running;
                let ask = || ask(&self.find(&entry.id).ok()?).ok();
                if let Some((state, memory)) = self.seen.or_ask(&entry.id, ask) {
                    report.state = state;
                    report.memory = Some(memory);
                    capacity.promised_bytes += memory.guest_bytes;
                    capacity.private_bytes += memory.private_bytes;
                }
            }
        }
        report
    }
}

fn missing_layers(jail: &JailStatus) -> Vec<MissingJailLayer> {
    let missing = jail.missing.iter().map(|missing| MissingJailLayer {
        layer: missing.layer.to_string(),
        reason: missing.reason.clone(),
    });
    missing.collect()
}

fn ask(vm: &RunningVm) -> Result<(VmState, VmMemory), ClientError> {
    let client = Client::new(vm.dir.control_socket()).with_timeout(ANSWER_LIMIT);
    let state = match client.info()?.state {
        Machine::Paused => VmState::Paused,
        _ => VmState::Running,
    };
    let memory = client.stats()?.memory;
    let guest = memory.guest.unwrap_or_default();
    Ok((
        state,
        VmMemory {
            guest_bytes: memory.guest_bytes,
            private_bytes: memory.private_bytes,
            shared_bytes: guest.shared_bytes,
            swapped_bytes: memory.swapped_bytes,
        },
    ))
}

/// What VMs said when they were last asked.
#[derive(Default)]
pub(super) struct Seen(Mutex<SeenState>);

#[derive(Default)]
struct SeenState {
    vms: HashMap<String, (Instant, VmState, VmMemory)>,
    /// How often something was forgotten: what was asked before tells of before.
    changes: u64,
}

impl Seen {
    /// A VM was made another than it said: it is asked again.
    pub(super) fn forget(&self, id: &str) {
        let mut state = lock(&self.0);
        state.vms.remove(id);
        state.changes += 1;
    }

    /// What the VM said, or says now, where that is too long ago. Nothing where it says nothing.
    fn or_ask(
        &self,
        id: &str,
        ask: impl FnOnce() -> Option<(VmState, VmMemory)>,
    ) -> Option<(VmState, VmMemory)> {
        let changes = {
            let state = lock(&self.0);
            match state.vms.get(id) {
                Some((at, state, memory)) if at.elapsed() < FRESH => {
                    return Some((*state, *memory));
                }
                _ => state.changes,
            }
        };
        let said = ask();
        let mut state = lock(&self.0);
        match said {
            Some((what, memory)) if state.changes == changes => {
                let now = (Instant::now(), what, memory);
                state.vms.insert(id.to_owned(), now);
            }
            _ => {
                state.vms.remove(id);
            }
        }
        said
    }

    /// Forgets all that are not among these.
    fn keep(&self, vms: &[VmReport]) {
        let there: HashSet<&str> = vms.iter().map(|vm| vm.id.as_str()).collect();
        lock(&self.0)
            .vms
            .retain(|id, _| there.contains(id.as_str()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(private_bytes: u64) -> Option<(VmState, VmMemory)> {
        let memory = VmMemory {
            private_bytes,
            ..VmMemory::default()
        };
        Some((VmState::Running, memory))
    }

    #[test]
    fn a_vm_is_asked_once_and_again_when_it_was_changed() {
        let seen = Seen::default();
        let told = |bytes| seen.or_ask("1", || said(bytes)).unwrap().1.private_bytes;
        assert_eq!((told(1), told(2)), (1, 1));
        seen.forget("1");
        assert_eq!((told(3), told(4)), (3, 3));
        // One that is changed while it is asked is asked the next time, too.
        seen.forget("1");
        seen.or_ask("1", || {
            seen.forget("1");
            said(5)
        });
        assert_eq!((told(6), told(7)), (6, 6));
        // What does not answer is not remembered, nor is what is gone.
        seen.forget("1");
        assert_eq!(seen.or_ask("1", || None), None);
        assert_eq!(told(8), 8);
        seen.keep(&[]);
        assert_eq!(told(9), 9);
    }
}
