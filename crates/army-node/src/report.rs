//! The report of a host and its VMs, which the controller requests about once a second.
//!
//! A question to a VM wakes its process and has it walk its page tables. So the answer of a VM that
//! was not changed is reported again for some time.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use army_api::hosts::{Capacity, MissingJailLayer};
use army_api::vms::{VmMemory, VmState};
use army_node_api::requests::{HostReport, VmReport};
use clone_api::control::VmState as Machine;
use clone_api::jail::JailStatus;
use clone_api::{Client, ClientError};
use clone_host::runtime::RunningVm;

use crate::figures::addresses;
use crate::journal::{Entry, Stage};
use crate::{Node, capacity, lock};

/// How long the answer of a VM is reported again.
const FRESH: Duration = Duration::from_secs(5);
/// How long a VM's process may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

impl Node {
    /// Reports the state of the host and of all VMs in the journal.
    pub fn report(&self) -> HostReport {
        let templates = self.store.path("x").unwrap_or_default();
        let mut capacity = capacity::measure(&templates, self.runtime.vms_dir());
        let entries = self.journal.all();
        let vms: Vec<VmReport> = entries
            .iter()
            .map(|entry| self.report_one(entry, &mut capacity))
            .collect();
        self.reports.retain(&vms);
        HostReport {
            capacity,
            missing_jail_layers: self.jail.get().map(missing_layers).unwrap_or_default(),
            vms,
            ready: self.standbys.ready(),
            standbys: Some(self.standbys.wanted()),
            cpu: self.cpu.clone(),
            notices: self.journal.notices().to_vec(),
        }
    }

    fn report_one(&self, entry: &Entry, capacity: &mut Capacity) -> VmReport {
        let mut report = VmReport {
            id: entry.id.clone(),
            state: VmState::Creating,
            reason: None,
            memory: None,
            addresses: Vec::new(),
            epoch: entry.epoch,
        };
        match &entry.stage {
            Stage::Begun => {}
            Stage::Arriving => report.state = VmState::Migrating,
            Stage::Ended(reason) => {
                report.state = VmState::Ended;
                report.reason = Some(reason.clone());
            }
            Stage::Failed(reason) => {
                report.state = VmState::Failed;
                report.reason = Some(reason.clone());
            }
            // It uses no memory.
            Stage::Running if entry.suspended => report.state = VmState::Suspended,
            Stage::Running => {
                report.state = VmState::Running;
                let ask = || ask(&self.find(&entry.id).ok()?).ok();
                if let Some(answer) = self.reports.or_ask(&entry.id, ask) {
                    let memory = answer.memory;
                    report.state = answer.state;
                    report.memory = Some(memory);
                    report.addresses = answer.addresses;
                    capacity.promised_bytes += memory.guest_bytes;
                    capacity.private_bytes += memory.private_bytes;
                }
                if entry.departure.is_some() {
                    report.state = VmState::Migrating;
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

/// What a VM answers.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Answer {
    state: VmState,
    memory: VmMemory,
    addresses: Vec<String>,
}

fn ask(vm: &RunningVm) -> Result<Answer, ClientError> {
    let client = Client::new(vm.dir.control_socket()).with_timeout(ANSWER_LIMIT);
    let state = match client.info()?.state {
        Machine::Paused | Machine::Arrived | Machine::Moved => VmState::Paused,
        _ => VmState::Running,
    };
    let memory = client.stats()?.memory;
    let guest = memory.guest.unwrap_or_default();
    Ok(Answer {
        state,
        memory: VmMemory {
            guest_bytes: memory.guest_bytes,
            private_bytes: memory.private_bytes,
            shared_bytes: guest.shared_bytes,
            swapped_bytes: memory.swapped_bytes,
        },
        addresses: addresses(vm),
    })
}

/// The last answers of VMs.
#[derive(Default)]
pub(crate) struct ReportCache(Mutex<CacheState>);

#[derive(Default)]
struct CacheState {
    vms: HashMap<String, (Instant, Answer)>,
    /// The number of invalidations. An answer to a question that precedes one is not kept.
    changes: u64,
}

impl ReportCache {
    /// Discards the answer of a VM whose state was changed.
    pub(crate) fn invalidate(&self, id: &str) {
        let mut state = lock(&self.0);
        state.vms.remove(id);
        state.changes += 1;
    }

    /// The answer of a VM, for which it is asked where the last answer is too old. `None` where it
    /// does not answer.
    fn or_ask(&self, id: &str, ask: impl FnOnce() -> Option<Answer>) -> Option<Answer> {
        let changes = {
            let state = lock(&self.0);
            match state.vms.get(id) {
                Some((at, answer)) if at.elapsed() < FRESH => return Some(answer.clone()),
                _ => state.changes,
            }
        };
        let answer = ask();
        let mut state = lock(&self.0);
        match &answer {
            Some(answer) if state.changes == changes => {
                let now = (Instant::now(), answer.clone());
                state.vms.insert(id.to_owned(), now);
            }
            _ => {
                state.vms.remove(id);
            }
        }
        answer
    }

    /// Discards the answers of all VMs except these.
    fn retain(&self, vms: &[VmReport]) {
        let known: HashSet<&str> = vms.iter().map(|vm| vm.id.as_str()).collect();
        lock(&self.0)
            .vms
            .retain(|id, _| known.contains(id.as_str()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(private_bytes: u64) -> Option<Answer> {
        let memory = VmMemory {
            private_bytes,
            ..VmMemory::default()
        };
        Some(Answer {
            state: VmState::Running,
            memory,
            addresses: Vec::new(),
        })
    }

    #[test]
    fn a_vm_is_asked_once_and_again_when_it_was_changed() {
        let cache = ReportCache::default();
        let reported = |bytes| {
            let answer = cache.or_ask("1", || answer(bytes));
            answer.unwrap().memory.private_bytes
        };
        assert_eq!((reported(1), reported(2)), (1, 1));
        cache.invalidate("1");
        assert_eq!((reported(3), reported(4)), (3, 3));
        // A VM that is changed while it is asked is asked the next time, too.
        cache.invalidate("1");
        cache.or_ask("1", || {
            cache.invalidate("1");
            answer(5)
        });
        assert_eq!((reported(6), reported(7)), (6, 6));
        // The answer of a VM that does not answer any more, or is gone, is discarded.
        cache.invalidate("1");
        assert_eq!(cache.or_ask("1", || None), None);
        assert_eq!(reported(8), 8);
        cache.retain(&[]);
        assert_eq!(reported(9), 9);
    }
}
