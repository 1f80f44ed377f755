//! Comparing what the journal says with what runs, and acting on the difference.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use agent_proto::client::{Connection, Deadline};
use army_api::vms::IdleAction;
use army_node_api::time::now_ms;
use army_node_api::{Error, ErrorKind};
use clone::host_net::{self, HostNet};
use clone::launch::fork;
use clone::runtime::RunningVm;

use super::journal::{Entry, Stage};
use super::watch::Watch;
use super::{Node, VM_PREFIX, lock, vm_name};

/// How long a guest may take to say whether commands run in it. One that is silent is idle.
const WORK_LIMIT: Duration = Duration::from_secs(2);
/// How often it is looked, if no VM ends before.
const ROUND: Duration = Duration::from_millis(500);
/// How often VMs of ours are looked for that the journal does not know, and the first time so long
/// after the start.
const ORPHANS_ROUND: Duration = Duration::from_secs(30);

/// Has the guests' packet filter rules made again when another program removes them. Without it they
/// are made with the next VM, and guests are cut off until then.
fn watch_network() -> Option<host_net::Watch> {
    HostNet::new(host_net::DEFAULT_DIR)
        .watch()
        .inspect_err(|error| tracing::warn!(%error, "the guests' packet filter is not watched"))
        .ok()
}

impl Node {
    /// Looks again and again, on a thread of its own, until the node is dropped.
    pub fn supervise(self: &Arc<Self>) -> std::io::Result<()> {
        let node = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("supervise".into())
            .spawn(move || {
                let _network = watch_network();
                let mut watch = Watch::default();
                let mut orphans_at = Instant::now() + ORPHANS_ROUND;
                while let Some(node) = node.upgrade() {
                    node.look(&mut watch);
                    if Instant::now() >= orphans_at {
                        node.sweep_orphans();
                        orphans_at = Instant::now() + ORPHANS_ROUND;
                    }
                    drop(node);
                    watch.wait(ROUND);
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

    fn look(&self, watch: &mut Watch) {
        for entry in self.journal.all() {
            if entry.stage == Stage::Running && self.runs(&entry, watch) {
                self.enforce(&entry);
            }
        }
    }

    /// Whether a VM runs. One that is known not to is written down as ended.
    fn runs(&self, entry: &Entry, watch: &mut Watch) -> bool {
        if watch.holds(&entry.id) {
            return true;
        }
        let open = |vm: RunningVm| vm.process.open().map_err(Error::from);
        match self.find(&entry.id).and_then(open) {
            Ok(Some(process)) => {
                watch.hold(&entry.id, process);
                true
            }
            // It cannot be told now, for want of open files, for one thing.
            Err(error) if error.kind != ErrorKind::NotFound => {
                tracing::warn!(vm = entry.id, %error, "cannot find out whether a VM runs");
                true
            }
            Ok(None) | Err(_) => {
                self.note(entry, Stage::Ended("its guest ended it".into()));
                lock(&self.used).remove(&entry.id);
                false
            }
        }
    }

    /// Enforces a VM's time to live and its idle policy.
    fn enforce(&self, entry: &Entry) {
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
        if !entry.asleep && self.is_at_work(entry) {
            return self.touch(&entry.id);
        }
        match policy.action {
            IdleAction::Destroy => self.end(entry, "nobody used it", false),
            IdleAction::Pause if !entry.asleep => {
                // Asleep first: whoever comes in between wakes a VM that is awake, which is no harm.
                let paused = self
                    .journal
                    .set_asleep(&entry.id, true)
                    .and_then(|()| self.pause(&entry.id));
                if let Err(error) = paused {
                    tracing::warn!(vm = entry.id, %error, "an idle VM could not be paused");
                    // Awake, then, and due again at the next look.
                    if let Err(error) = self.journal.set_asleep(&entry.id, false) {
                        tracing::warn!(vm = entry.id, %error, "it counts as paused");
                    }
                }
            }
            IdleAction::Pause => {}
        }
    }

    /// Whether commands run in a VM that nobody is connected to: detached ones, for one.
    fn is_at_work(&self, entry: &Entry) -> bool {
        let Ok(vm) = self.find(&entry.id) else {
            return false;
        };
        let deadline = Deadline::after(WORK_LIMIT);
        let agent = Connection::open(&vm.dir.vsock_socket(), deadline);
        let info = agent.and_then(Connection::info);
        info.is_ok_and(|info| info.commands > 0)
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
        if let Err(error) = self.journal.advance(&entry.id, stage) {
            tracing::error!(vm = entry.id, %error, "the journal cannot be written");
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

    /// Forgets what is over, when the controller has written it down.
    pub fn forget(&self, ids: &[String]) {
        for id in ids {
            let over = self.journal.get(id).is_ok_and(|it| !it.stage.is_alive());
            if over && let Err(error) = self.journal.forget(id) {
                tracing::warn!(vm = id, %error, "the journal keeps a VM that is over");
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::AtomicU32;

    use agent_proto::frame;
    use agent_proto::messages::{FromAgent, Hello, Info, from_agent::Kind};
    use army_api::vms::IdlePolicy;
    use clone::runtime::{Process, Runtime};
    use clone::template::Store;
    use clone_api::VmConfig;

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
                // Until the other side has read it.
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
        starting.write_config(&config).unwrap();
        let mut process = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        starting
            .write_process(Process::of(process.id()).unwrap())
            .unwrap();
        let commands = Arc::new(AtomicU32::new(1));
        serve_agent(starting.dir.vsock_socket(), Arc::clone(&commands));
        // Its lock says that it is still being started.
        drop(starting);
        let mut entry = Entry::new("1".to_owned(), 1, "a".to_owned());
        entry.idle = Some(IdlePolicy {
            after_s: 1,
            action: IdleAction::Destroy,
        });
        node.journal.begin(&entry).unwrap();
        node.journal.advance("1", Stage::Running).unwrap();
        let look_when_unused = || {
            node.touch("1");
            let long_ago = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
            lock(&node.used).get_mut("1").unwrap().last = long_ago;
            node.look(&mut Watch::default());
            node.journal.get("1").unwrap().stage
        };
        assert_eq!(look_when_unused(), Stage::Running);
        // It counts as used until its command ended.
        assert!(lock(&node.used)["1"].last.elapsed() < Duration::from_secs(4));
        commands.store(0, Ordering::Relaxed);
        assert_eq!(look_when_unused(), Stage::Ended("nobody used it".into()));
        process.wait().unwrap();
    }

    #[test]
    fn a_vm_is_over_when_it_is_known_not_to_run_and_not_when_it_cannot_be_told() {
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
        // No file, and neither absent.
        fs::create_dir_all(unreadable.path().join("pid")).unwrap();
        node.look(&mut Watch::default());
        let stage = |id: &str| node.journal.get(id).unwrap().stage;
        assert_eq!(stage("1"), Stage::Running);
        assert_eq!(stage("2"), Stage::Ended("its guest ended it".into()));
    }
}
