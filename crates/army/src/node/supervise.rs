//! Comparing what the journal says with what runs, and acting on the difference.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use army_api::hosts::Capacity;
use army_api::vms::{IdleAction, VmMemory, VmState};
use clone::launch::fork;
use clone::runtime::RunningVm;
use clone_api::control::VmState as Machine;
use clone_api::{Client, ClientError};

use super::journal::{Entry, Stage};
use super::{Node, Report, VM_PREFIX, VmReport, capacity, lock, vm_name};

/// How often it is looked.
const ROUND: Duration = Duration::from_millis(500);
/// A VM of ours that the journal does not know is left alone for so long after the start.
const GRACE: Duration = Duration::from_secs(30);
/// How long a VM's process may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

impl Node {
    /// Looks again and again, on a thread of its own, until the node is dropped.
    pub fn supervise(self: &Arc<Self>) -> std::io::Result<()> {
        let node = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("supervise".into())
            .spawn(move || {
                while let Some(node) = node.upgrade() {
                    node.look();
                    drop(node);
                    std::thread::sleep(ROUND);
                }
            })
            .map(drop)
    }

    /// After a start: VMs that an earlier life made run on. One that it was about to make may have
    /// been left without its identity, and nobody was told of it: it is ended.
    pub(super) fn take_up(&self) {
        for entry in self.journal.all() {
            match entry.stage {
                Stage::Begun => self.end(&entry, "the node was restarted while it was made", true),
                Stage::Ended(_) | Stage::Failed(_) => self.sweep(&entry),
                Stage::Running => self.touch(&entry.id),
            }
        }
    }

    fn look(&self) {
        for entry in self.journal.all() {
            if entry.stage == Stage::Running {
                self.look_at(&entry);
            }
        }
        if self.started.elapsed() > GRACE {
            self.sweep_orphans();
        }
    }

    fn look_at(&self, entry: &Entry) {
        if self.find(&entry.id).is_err() {
            self.note(entry, Stage::Ended("its guest ended it".into()));
            lock(&self.used).remove(&entry.id);
            return;
        }
        if entry.is_expired(boot_ms(), now_ms()) {
            return self.end(entry, "its time to live was over", false);
        }
        let Some(policy) = entry.idle else { return };
        let idle = lock(&self.used).get_mut(&entry.id).map(|it| {
            if it.open.load(Ordering::Relaxed) > 0 {
                it.last = Instant::now();
            }
            it.last.elapsed()
        });
        if idle.is_none_or(|idle| idle < Duration::from_secs(policy.after_s)) {
            return;
        }
        match policy.action {
            IdleAction::Destroy => self.end(entry, "nobody used it", false),
            IdleAction::Pause if !entry.asleep => {
                // Asleep first: whoever comes in between wakes a VM that is awake, which is no harm.
                let paused = self
                    .journal
                    .set_asleep(&entry.id, true)
                    .and_then(|()| self.pause(&entry.id));
                if let Err(problem) = paused {
                    tracing::warn!(vm = entry.id, %problem, "an idle VM could not be paused");
                    // Awake, then, and due again at the next look.
                    if let Err(problem) = self.journal.set_asleep(&entry.id, false) {
                        tracing::warn!(vm = entry.id, %problem, "it counts as paused");
                    }
                }
            }
            IdleAction::Pause => {}
        }
    }

    fn end(&self, entry: &Entry, reason: &str, failed: bool) {
        let stage = match failed {
            true => Stage::Failed(reason.to_owned()),
            false => Stage::Ended(reason.to_owned()),
        };
        self.note(entry, stage);
        self.sweep(entry);
        lock(&self.used).remove(&entry.id);
    }

    fn note(&self, entry: &Entry, stage: Stage) {
        if let Err(problem) = self.journal.advance(&entry.id, stage) {
            tracing::error!(vm = entry.id, %problem, "the journal cannot be written");
        }
    }

    /// Ends what still runs of a VM that is over.
    fn sweep(&self, entry: &Entry) {
        if let Ok(vm) = self.runtime.find(&vm_name(&entry.id)) {
            fork::end(&self.runtime, &vm);
        }
    }

    /// VMs of ours that nobody knows: of a journal that was lost.
    fn sweep_orphans(&self) {
        let Ok(running) = self.runtime.running() else {
            return;
        };
        let known: HashSet<String> = self
            .journal
            .all()
            .iter()
            .map(|it| vm_name(&it.id))
            .collect();
        for vm in running {
            let name = vm.dir.name();
            if name.starts_with(VM_PREFIX) && !known.contains(&name) {
                tracing::warn!(vm = name, "nobody knows this VM: it is ended");
                fork::end(&self.runtime, &vm);
            }
        }
    }

    /// What the controller is told: the host and all that the journal knows.
    pub fn report(&self) -> Report {
        let templates = self.store.path("x").unwrap_or_default();
        let mut capacity = capacity::measure(&templates);
        let entries = self.journal.all();
        let vms = entries
            .iter()
            .map(|entry| self.report_one(entry, &mut capacity))
            .collect();
        Report {
            capacity,
            vms,
            ready: self.standbys.ready(),
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
                if let Ok(vm) = self.find(&entry.id)
                    && let Ok((state, memory)) = ask(&vm)
                {
                    report.state = state;
                    report.memory = Some(memory);
                    capacity.promised_bytes += memory.guest_bytes;
                    capacity.private_bytes += memory.private_bytes;
                }
            }
        }
        report
    }

    /// Forgets what is over, when the controller has written it down.
    pub fn forget(&self, ids: &[String]) {
        for id in ids {
            let over = self.journal.get(id).is_ok_and(|it| !it.stage.is_alive());
            if over && let Err(problem) = self.journal.forget(id) {
                tracing::warn!(vm = id, %problem, "the journal keeps a VM that is over");
            }
        }
    }
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

/// Since the host's start, sleep included, in milliseconds: what nobody sets.
pub(super) fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let Ok(now) = Duration::try_from(now) else {
        // Before the host's start: it cannot be.
        return 0;
    };
    now.as_millis() as u64
}

/// The host's clock.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_millis() as u64)
}
