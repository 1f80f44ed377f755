//! When a VM's process reached each stage of its start, for whoever wants to know what a start or
//! a fork spends its time on. A reading of the clock for each stage is all that it costs.

use clone_api::control::{StageTime, StartStage};
use clone_vmm::vcpu::{EntryTime, monotonic_ns};

/// The stages so far.
#[derive(Debug, Default)]
pub(super) struct Timeline {
    reached: Vec<StageTime>,
    entry: Option<EntryTime>,
}

impl Timeline {
    /// Notes that `stage` is reached now.
    pub(super) fn reach(&mut self, stage: StartStage) {
        self.reached.push(StageTime {
            stage,
            monotonic_ns: monotonic_ns(),
        });
    }

    /// The guest's first instruction is noted there, by the CPU that runs it.
    pub(super) fn watch(&mut self, entry: EntryTime) {
        self.entry = Some(entry);
    }

    /// All stages that were reached, in order.
    pub(super) fn stages(&self) -> Vec<StageTime> {
        let entered = self.entry.as_ref().and_then(EntryTime::monotonic_ns);
        let entered = entered.map(|monotonic_ns| StageTime {
            stage: StartStage::Entered,
            monotonic_ns,
        });
        self.reached.iter().copied().chain(entered).collect()
    }
}
