//! Comparing what the journal says with what runs, and acting on the difference.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_proto::client::{Connection, Deadline};
use army_api::vms::IdleAction;
use army_node_api::time::now_ms;
use army_node_api::{Error, ErrorKind};
use clone_host::host_net::{self, HostNet};
use clone_host::launch::fork;
use clone_host::runtime::RunningVm;

use crate::journal::{Entry, Stage};
use crate::watch::Watch;
use crate::{Node, VM_PREFIX, lock, vm_name};

/// How long a guest may take to say whether commands run in it. A guest that does not answer counts
/// as idle.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How often VMs are examined, if none of them ends before.
const ROUND: Duration = Duration::from_millis(500);
/// How often VMs that the journal does not know are looked for, and how long after the start for the
/// first time.
const UNKNOWN_ROUND: Duration = Duration::from_secs(30);

/// Restores the guests' packet filter rules when another program removes them. Without this they are
/// restored with the next VM, and guests have no network until then.
fn watch_network() -> Option<host_net::Watch> {
    HostNet::new(host_net::DEFAULT_DIR)
        .watch()
        .inspect_err(|error| tracing::warn!(%error, "the guests' packet filter is not watched"))
        .ok()
}

impl Node {
    /// Starts a thread that examines the VMs until the node is dropped.
    pub fn supervise(self: &Arc<Self>) -> std::io::Result<()> {
        let node = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("supervise".into())
            .spawn(move || {
                let _network = watch_network();
                let mut watch = Watch::default();
                let mut unknown_at = Instant::now() + UNKNOWN_ROUND;
                while let Some(node) = node.upgrade() {
                    node.examine_vms(&mut watch);
                    if Instant::now() >= unknown_at {
                        node.end_unknown_vms();
                        unknown_at = Instant::now() + UNKNOWN_ROUND;
                    }
                    drop(node);
                    watch.wait(ROUND);
                }
            })
            .map(drop)
    }

    /// Continues where an earlier process of this node stopped. VMs that run are left running. A VM
    /// that it was creating may not have its own identity, and the controller has no answer: it is
    /// ended.
    pub(crate) fn recover(&self) {
        for entry in self.journal.all() {
            match entry.stage {
                Stage::Begun => self.end(&entry, "the node was restarted while it was made", true),
                Stage::Arriving => self.recover_arrival(&entry),
                Stage::Ended(_) | Stage::Failed(_) => self.end_what_is_left(&entry),
                Stage::Running => {
                    if entry.suspended {
                        self.recover_suspended(&entry);
                    }
                    self.mark_used(&entry.id);
                }
            }
        }
    }

    fn examine_vms(&self, watch: &mut Watch) {
        for entry in self.journal.all() {
            // The policies of a VM that is being moved apply again when it is known where it is.
            if entry.departure.is_some() {
                continue;
            }
            if entry.stage == Stage::Running && entry.suspended {
                self.enforce_time_to_live(&entry);
            } else if entry.stage == Stage::Running && self.is_running(&entry, watch) {
                self.enforce(&entry);
            }
        }
    }

    /// Whether a VM runs. A VM that is known not to run is recorded as ended.
    fn is_running(&self, entry: &Entry, watch: &mut Watch) -> bool {
        if watch.contains(&entry.id) {
            return true;
        }
        let open = |vm: RunningVm| vm.process.open().map_err(Error::from);
        match self.find(&entry.id).and_then(open) {
            Ok(Some(process)) => {
                watch.add(&entry.id, process);
                true
            }
            // It cannot be found out now, for example because there are too many open files.
            Err(error) if error.kind != ErrorKind::NotFound => {
                tracing::warn!(vm = entry.id, %error, "cannot find out whether a VM runs");
                true
            }
            Ok(None) | Err(_) => {
                // The VM may have been suspended, or sent to another host, since its record was read.
                let now = self.journal.get(&entry.id);
                if now.is_ok_and(|now| now.suspended || now.departure.is_some()) {
                    return false;
                }
                self.record(entry, Stage::Ended("its guest ended it".into()));
                lock(&self.usage).remove(&entry.id);
                false
            }
        }
    }

    /// Enforces a VM's time to live and its idle policy.
    fn enforce(&self, entry: &Entry) {
        if self.enforce_time_to_live(entry) {
            return;
        }
        let Some(policy) = entry.idle else { return };
        let idle = lock(&self.usage)
            .get_mut(&entry.id)
            .map(|usage| usage.idle_time());
        if idle.is_none_or(|idle| idle < Duration::from_secs(policy.after_s)) {
            return;
        }
        if !entry.asleep && self.has_running_commands(entry) {
            return self.mark_used(&entry.id);
        }
        match policy.action {
            IdleAction::Destroy => {
                self.end_if(entry, "nobody used it", |now| now.idle == entry.idle);
            }
            IdleAction::Pause => self.pause_idle(entry),
            // Checkpoints would end with the VM's process.
            IdleAction::Suspend if self.has_checkpoints(&entry.id) => self.pause_idle(entry),
            IdleAction::Suspend => {
                if let Err(error) = self.suspend(&entry.id) {
                    tracing::warn!(vm = entry.id, %error, "cannot suspend an idle VM");
                    // It is tried again after the same time.
                    self.mark_used(&entry.id);
                }
            }
        }
    }

    /// Pauses a VM that is idle, unless it was paused for that before.
    fn pause_idle(&self, entry: &Entry) {
        if entry.asleep {
            return;
        }
        // The journal is written first: a user who connects in between resumes a VM that still
        // runs, which does no harm.
        let paused = self
            .journal
            .set_asleep(&entry.id, true)
            .and_then(|()| self.pause(&entry.id));
        if let Err(error) = paused {
            tracing::warn!(vm = entry.id, %error, "cannot pause an idle VM");
            // The VM still runs, and pausing it is tried again in the next round.
            if let Err(error) = self.journal.set_asleep(&entry.id, false) {
                tracing::warn!(vm = entry.id, %error, "a running VM is recorded as paused");
            }
        }
    }

    pub(crate) fn has_checkpoints(&self, id: &str) -> bool {
        let listed = self.checkpoints(id);
        listed.is_ok_and(|list| !list.checkpoints.is_empty())
    }

    /// Ends a VM whose time to live is over. Returns whether it is.
    fn enforce_time_to_live(&self, entry: &Entry) -> bool {
        let is_over = entry.is_expired(boot_ms(), now_ms());
        if is_over {
            self.end_if(entry, "its time to live was over", |entry| {
                entry.is_expired(boot_ms(), now_ms())
            });
        }
        is_over
    }

    /// Whether commands run in a VM that nobody is connected to, such as detached ones.
    fn has_running_commands(&self, entry: &Entry) -> bool {
        let Ok(vm) = self.find(&entry.id) else {
            return false;
        };
        let deadline = Deadline::after(ANSWER_LIMIT);
        let agent = Connection::open(&vm.dir.vsock_socket(), deadline);
        let info = agent.and_then(Connection::info);
        info.is_ok_and(|info| info.commands > 0)
    }

    /// Ends a VM for a reason that still holds by its record: it may have been changed since the
    /// record was read.
    fn end_if(&self, entry: &Entry, reason: &str, condition: impl FnOnce(&Entry) -> bool) {
        let stage = Stage::Ended(reason.to_owned());
        match self.journal.end_if(&entry.id, stage, condition) {
            Ok(true) => {
                self.end_what_is_left(entry);
                lock(&self.usage).remove(&entry.id);
            }
            Ok(false) => {}
            Err(error) => tracing::error!(vm = entry.id, %error, "cannot write the journal"),
        }
    }

    pub(crate) fn end(&self, entry: &Entry, reason: &str, failed: bool) {
        let stage = match failed {
            true => Stage::Failed(reason.to_owned()),
            false => Stage::Ended(reason.to_owned()),
        };
        self.record(entry, stage);
        self.end_what_is_left(entry);
        lock(&self.usage).remove(&entry.id);
    }

    fn record(&self, entry: &Entry, stage: Stage) {
        if let Err(error) = self.journal.advance(&entry.id, stage) {
            tracing::error!(vm = entry.id, %error, "cannot write the journal");
        }
    }

    /// Ends the process of a VM that has ended by the journal, and removes its state.
    fn end_what_is_left(&self, entry: &Entry) {
        if let Err(error) = self.end_for_good(&entry.id) {
            tracing::error!(vm = entry.id, %error, "something of a VM that has ended is left");
        }
    }

    /// Ends VMs of Army that are not in the journal, because it was lost. A VM whose file could not be
    /// read is left running, for an administrator to decide about.
    fn end_unknown_vms(&self) {
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
            let Some(id) = name.strip_prefix(VM_PREFIX) else {
                continue;
            };
            if !known.contains(&name) && !self.journal.is_put_aside(id) {
                tracing::warn!(vm = name, "ending a VM that is not in the journal");
                fork::end(&self.runtime, &vm);
            }
        }
    }

    /// Removes VMs that have ended from the journal, once the controller has recorded it.
    pub fn forget(&self, ids: &[String]) {
        for id in ids {
            let has_ended = self.journal.get(id).is_ok_and(|it| !it.stage.is_alive());
            if has_ended && let Err(error) = self.journal.forget(id) {
                tracing::warn!(vm = id, %error, "cannot remove a VM from the journal");
            }
        }
    }
}

/// The time since the host's start, including sleep, in milliseconds. Nobody can set this clock.
pub(crate) fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // The time is never negative.
    Duration::try_from(now).map_or(0, |now| now.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicU32, Ordering};

    use agent_proto::frame;
    use agent_proto::messages::{FromAgent, Hello, Info, from_agent::Kind};
    use army_api::vms::IdlePolicy;
    use clone_api::VmConfig;
    use clone_host::runtime::Runtime;
    use clone_start::Process;
    use clone_template::Store;

    use super::*;

    /// Answers each connection to a VM's agent with how many commands run.
    fn serve_agent(socket: std::path::PathBuf, commands: Arc<AtomicU32>) {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut bytes = b"OK 1\n".to_vec();
                let info = Info {
                    commands: commands.load(Ordering::Relaxed),
                    ..Info::default()
                };
                for kind in [Kind::Hello(Hello::default()), Kind::Info(info)] {
                    frame::encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
                }
                stream.write_all(&bytes).unwrap();
                // The connection stays open until the other side has read the answer.
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
    }

    #[test]
    fn a_vm_with_a_detached_command_at_work_is_not_idle() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let runtime = Runtime::at(&path("run")).unwrap();
        let store = Store::at(path("templates"));
        let node = Node::open("here".into(), path("state"), runtime, store).unwrap();
        let config = VmConfig {
            name: vm_name("1"),
            kernel: "k".into(),
            ..VmConfig::default()
        };
        let starting = node.runtime.create(&config).unwrap();
        starting.dir.write_config(&config).unwrap();
        let mut process = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        starting
            .dir
            .write_process(Process::of(process.id()).unwrap())
            .unwrap();
        let commands = Arc::new(AtomicU32::new(1));
        serve_agent(starting.dir.vsock_socket(), Arc::clone(&commands));
        // While its lock is held, the VM counts as being started.
        drop(starting);
        let mut entry = Entry::new("1".to_owned(), 1, "a".to_owned());
        entry.idle = Some(IdlePolicy {
            after_s: 1,
            action: IdleAction::Destroy,
        });
        node.journal.begin(&entry).unwrap();
        node.journal.advance("1", Stage::Running).unwrap();
        let examine_when_unused = || {
            node.mark_used("1");
            let long_ago = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
            lock(&node.usage).get_mut("1").unwrap().last = long_ago;
            node.examine_vms(&mut Watch::default());
            node.journal.get("1").unwrap().stage
        };
        assert_eq!(examine_when_unused(), Stage::Running);
        // The VM counts as used until its command ends.
        assert!(lock(&node.usage)["1"].last.elapsed() < Duration::from_secs(4));
        commands.store(0, Ordering::Relaxed);
        assert_eq!(examine_when_unused(), Stage::Ended("nobody used it".into()));
        process.wait().unwrap();
    }

    #[test]
    fn a_vm_has_ended_when_it_is_known_not_to_run_and_not_when_that_is_unknown() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let runtime = Runtime::at(&path("run")).unwrap();
        let unreadable = runtime.dir(&vm_name("1"));
        let store = Store::at(path("templates"));
        let node = Node::open("here".into(), path("state"), runtime, store).unwrap();
        for id in ["1", "2"] {
            let entry = Entry::new(id.to_owned(), 1, "a".to_owned());
            node.journal.begin(&entry).unwrap();
            node.journal.advance(id, Stage::Running).unwrap();
        }
        // The process file is a directory: it exists and cannot be read.
        fs::create_dir_all(unreadable.path().join("pid")).unwrap();
        node.examine_vms(&mut Watch::default());
        let stage = |id: &str| node.journal.get(id).unwrap().stage;
        assert_eq!(stage("1"), Stage::Running);
        assert_eq!(stage("2"), Stage::Ended("its guest ended it".into()));
    }
}
