//! The times at which a VM's process reached each stage of its start, which show what a start or a
//! fork spends its time on. Recording costs one reading of the clock per stage.

use clone_api::control::{StageTime, StartStage};
use clone_vmm::vcpu::{EntryTime, monotonic_ns};

/// The stages reached so far.
#[derive(Debug, Default)]
pub(super) struct Timeline {
    reached: Vec<StageTime>,
    entry: Option<EntryTime>,
}

impl Timeline {
    /// Records that `stage` is reached now.
    pub(super) fn reach(&mut self, stage: StartStage) {
        self.reached.push(StageTime {
            stage,
            monotonic_ns: monotonic_ns(),
        });
    }

    /// Sets where the time of the guest's first instruction is read. The vCPU that runs the
    /// instruction records it in `entry`.
    pub(super) fn watch(&mut self, entry: EntryTime) {
        self.entry = Some(entry);
    }

    /// All stages that were reached, in order of time.
    pub(super) fn stages(&self) -> Vec<StageTime> {
        let entered = self.entry.as_ref().and_then(EntryTime::monotonic_ns);
        let entered = entered.map(|monotonic_ns| StageTime {
            stage: StartStage::Entered,
            monotonic_ns,
        });
        self.reached.iter().copied().chain(entered).collect()
    }
}
