//! The running VM: its event loop, and the operations that its control socket offers.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clone_api::checkpoints::{CheckpointList, CheckpointName, NewCheckpoint};
use clone_api::control::{
    Adoption, BalloonStatus, ConsoleInfo, CpuStats, Custody, GuestPages, LayerPages, MemoryStats,
    MigrationRequest, MigrationStatus, SnapshotRequest, StartStage, TouchedPages, VmInfo, VmState,
    VmStats,
};
use clone_api::jail::JailStatus;
use clone_api::{ApiError, Bytes, ErrorCode, VmConfig};
use clone_start::VmDir;
use clone_vmm::devices::balloon::Balloon;
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::{Exit, ExitSignal, GuestTime};
use clone_vmm::virtio::DeviceError;
use vmm_sys_util::epoll::EventSet;

use super::checkpoints::Checkpoints;
use super::console::ConsoleHub;
use super::control::{Responder, VmControl};
use super::devices::{Handles, balloon_status};
use super::dirty_tracker::DirtyTracker;
use super::machine::{GuestMachine, SharedMachine, locked, machine_error};
use super::migrate::{self, Migration};
use super::open::BootFiles;
use super::prefetch;
use super::reboot::Reboot;
use super::snapshot::{self, SharedSnapshotSource, SnapshotDisk, SnapshotSource};
use super::threads::work_apart;
use super::timeline::Timeline;
use super::{checkpointing, rewind};

/// Locked for a moment each, by the event loop's thread alone: its two owners are both on it.
type SharedTimeline = Arc<Mutex<Timeline>>;

/// A VM in its event loop.
pub(super) struct Vm {
    machine: SharedMachine,
    timeline: SharedTimeline,
    hub: Arc<Mutex<ConsoleHub>>,
    exit: ExitSignal,
    reboot: Option<Reboot>,
    /// Whether the guest runs only when the control socket says so: a standby, and a VM that comes
    /// from another host.
    waits: bool,
    /// Locks on the templates and live layers that the VM uses, which keep them from being removed.
    _locks: Vec<File>,
}

impl Vm {
    pub(super) fn new(
        machine: GuestMachine,
        hub: Arc<Mutex<ConsoleHub>>,
        timeline: SharedTimeline,
        waits: bool,
        locks: Vec<File>,
        events: &mut EventLoop,
    ) -> io::Result<Self> {
        let exit = machine.exit_signal();
        // This slot has no handler: its event only ends the wait, and the loop then checks the exit
        // signal.
        events.reserve().add(&exit, 0, EventSet::IN)?;
        Ok(Self {
            machine: Arc::new(Mutex::new(machine)),
            timeline,
            hub,
            exit,
            reboot: None,
            waits,
            _locks: locks,
        })
    }

    /// Makes the source that snapshots are taken of.
    pub(super) fn snapshot_source(
        &self,
        dirty_tracker: DirtyTracker,
        disks: Vec<SnapshotDisk>,
        boot: Option<BootFiles>,
    ) -> SharedSnapshotSource {
        Arc::new(Mutex::new(SnapshotSource {
            machine: Arc::clone(&self.machine),
            dirty_tracker,
            disks,
            boot,
            checkpoints: Checkpoints::default(),
        }))
    }

    /// Allows the guest to reboot, as `reboot` says.
    pub(super) fn on_reboot(&mut self, reboot: Reboot) {
        self.reboot = Some(reboot);
    }

    /// Whether the guest waits for the control socket to let it run.
    pub(super) fn waits(&self) -> bool {
        self.waits
    }

    /// Lets the guest run its first instruction.
    pub(super) fn begin(&mut self) -> Result<(), ApiError> {
        locked(&self.machine).resume()?;
        self.reach(StartStage::Resumed);
        Ok(())
    }

    /// Records that the start has reached `stage`.
    pub(super) fn reach(&self, stage: StartStage) {
        timeline(&self.timeline).reach(stage);
    }

    /// Serves the VM until it ends.
    pub(super) fn run(&mut self, events: &mut EventLoop) -> io::Result<Exit> {
        let exit = loop {
            let exit = match (self.exit.get(), &mut self.reboot) {
                (Some(Exit::Reboot), Some(reboot)) => reboot.grant(&self.exit),
                (exit, _) => exit,
            };
            if let Some(exit) = exit {
                break exit;
            }
            events.run_once(-1)?;
        };
        // Pausing lets disk writes in progress reach their files, and flushing the hub writes the
        // guest's last output to the log.
        if let Err(error) = locked(&self.machine).pause() {
            tracing::warn!(%error, "the devices did not stop in order");
        }
        self.hub
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .flush();
        Ok(exit)
    }
}

fn timeline(shared: &SharedTimeline) -> MutexGuard<'_, Timeline> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes the event loop when it is dropped at the end of a snapshot, for which a reboot may be
/// waiting.
struct WakeAtEnd(ExitSignal);

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.notify();
    }
}

/// The VM as the control socket's operations use it.
pub(super) struct VmHandle {
    machine: SharedMachine,
    timeline: SharedTimeline,
    exit: ExitSignal,
    config: VmConfig,
    console: ConsoleInfo,
    handles: VmHandles,
    started_unix_ms: u64,
}

/// The handles through which a running VM is observed and controlled.
pub(super) struct VmHandles {
    /// The process's open `/proc/self/smaps_rollup`.
    pub(super) memory_map: File,
    /// The number of clients attached to the console.
    pub(super) attached: Arc<AtomicU32>,
    /// The devices.
    pub(super) devices: Handles,
    /// The source that snapshots are taken of.
    pub(super) snapshot_source: SharedSnapshotSource,
    /// The state of a migration.
    pub(super) migration: Arc<Migration>,
    /// The layers that the process's jail has and lacks.
    pub(super) jail: JailStatus,
    /// The console, whose clients are told of a rewind.
    pub(super) hub: Arc<Mutex<ConsoleHub>>,
    /// For a standby, the guest time at which its clocks continue.
    pub(super) standby: Option<GuestTime>,
}

impl VmHandle {
    /// Makes a handle of `vm`.
    pub(super) fn new(vm: &Vm, dir: &VmDir, config: VmConfig, handles: VmHandles) -> Self {
        Self {
            machine: Arc::clone(&vm.machine),
            timeline: Arc::clone(&vm.timeline),
            exit: vm.exit.clone(),
            console: ConsoleInfo {
                socket: dir.console_socket().display().to_string(),
                log: dir.console_log().display().to_string(),
                log_limit_bytes: config.console.log_limit.0,
                attached: 0,
            },
            config,
            handles,
            started_unix_ms: clone_base::clock::unix_ms(),
        }
    }

    /// The guest's RAM, counted by the origin of its pages; `None` while a snapshot is taken.
    fn guest_pages(&self) -> Result<Option<GuestPages>, ApiError> {
        let Ok(snapshot_source) = self.handles.snapshot_source.try_lock() else {
            return Ok(None);
        };
        let dirty_tracker = &snapshot_source.dirty_tracker;
        let usage = dirty_tracker.memory().usage(dirty_tracker.pagemap());
        let usage = usage.map_err(|error| ApiError::internal(&error))?;
        let layers = usage.layers.iter().map(|layer| LayerPages {
            shared_bytes: layer.shared,
            private_bytes: layer.private,
        });
        Ok(Some(GuestPages {
            private_bytes: usage.private,
            shared_bytes: usage.shared,
            swapped_bytes: usage.swapped,
            layers: layers.collect(),
        }))
    }

    /// Renames the VM to match its renamed runtime directory.
    fn rename(&mut self, name: &str) {
        let old = Path::new(&self.console.socket).parent().map(Path::to_owned);
        let Some(vms) = old.as_deref().and_then(Path::parent) else {
            return;
        };
        let dir = VmDir::at(vms.join(name));
        self.console.socket = dir.console_socket().display().to_string();
        self.console.log = dir.console_log().display().to_string();
        name.clone_into(&mut self.config.name);
    }

    /// Applies `act` to the balloon, and returns the balloon's status.
    fn with_balloon(
        &self,
        act: impl FnOnce(&mut Balloon) -> Result<(), DeviceError>,
    ) -> Result<BalloonStatus, ApiError> {
        let balloon = self.handles.devices.balloon.as_ref();
        let balloon = balloon.ok_or_else(|| no_balloon(&self.config.name))?;
        let mut balloon = balloon.lock().unwrap_or_else(PoisonError::into_inner);
        act(&mut balloon).map_err(|error| ApiError::internal(&error))?;
        Ok(balloon_status(&balloon))
    }

    /// Runs `work`, which waits for the guest or the disk, on another thread. If none can be
    /// started, the responder in `work` is dropped, which sends the client an error.
    fn on_thread(&self, name: &str, work: impl FnOnce() + Send + 'static) {
        let wake = WakeAtEnd(self.exit.clone());
        work_apart(name, move || {
            let _wake = wake;
            work();
        });
    }

    /// Returns an error unless the guest has begun to run and has not ended.
    fn check_alive(&self) -> Result<(), ApiError> {
        if self.handles.standby.is_some() {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                "the VM is a standby: it waits to be given its name",
            ));
        }
        match self.exit.get() {
            None => Ok(()),
            Some(Exit::Reboot) => Err(ApiError::new(
                ErrorCode::Conflict,
                format!("the VM `{}` is rebooting", self.config.name),
            )
            .advise("try again")),
            Some(_) => Err(ApiError::new(
                ErrorCode::Conflict,
                format!("the VM `{}` is ending", self.config.name),
            )),
        }
    }
}

impl VmControl for VmHandle {
    fn info(&self) -> VmInfo {
        let state = if self.exit.get().is_some() {
            VmState::Stopping
        } else if self.handles.standby.is_some() {
            VmState::Standby
        } else {
            let machine = locked(&self.machine);
            match machine.custody() {
                Custody::Incoming => VmState::Incoming,
                Custody::Arrived => VmState::Arrived,
                Custody::Moved if self.handles.migration.progress().is_none() => VmState::Moved,
                _ if machine.is_running() => VmState::Running,
                _ => VmState::Paused,
            }
        };
        VmInfo {
            share_failures: self.handles.devices.share_failures(),
            name: self.config.name.clone(),
            state,
            pid: std::process::id(),
            started_unix_ms: self.started_unix_ms,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            jail: self.handles.jail.clone(),
            config: self.config.clone(),
            rewound: locked(&self.machine).last_rewind(),
            timeline: timeline(&self.timeline).stages(),
        }
    }

    fn stats(&mut self) -> Result<VmStats, ApiError> {
        let mut text = vec![0; 4096];
        let length = self
            .handles
            .memory_map
            .read_at(&mut text, 0)
            .map_err(|error| ApiError::internal(&error))?;
        let mut memory = parse_memory_map(&String::from_utf8_lossy(&text[..length]));
        memory.guest_bytes = self.config.memory.0;
        memory.guest = self.guest_pages()?;
        Ok(VmStats {
            memory,
            cpu: cpu_time(),
            balloon: self.balloon().ok(),
            devices: self.handles.devices.counters(),
        })
    }

    fn pause(&mut self) -> Result<(), ApiError> {
        self.check_alive()?;
        if self.handles.migration.progress().is_some() {
            let message = "the VM is being moved to another host, where it is to run";
            return Err(ApiError::new(ErrorCode::Conflict, message));
        }
        locked(&self.machine)
            .pause()
            .map(drop)
            .map_err(machine_error)
    }

    fn resume(&mut self) -> Result<(), ApiError> {
        self.check_alive()?;
        locked(&self.machine).resume()
    }

    fn power_button(&mut self) -> Result<(), ApiError> {
        self.check_alive()?;
        let machine = locked(&self.machine);
        if !machine.is_running() {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "the VM `{}` is paused: its guest cannot react",
                    self.config.name
                ),
            )
            .advise("resume it first"));
        }
        machine.press_power_button();
        Ok(())
    }

    fn kill(&mut self) {
        self.exit.send(Exit::Killed);
    }

    fn balloon(&mut self) -> Result<BalloonStatus, ApiError> {
        self.with_balloon(|balloon| {
            // The guest answers later: this call returns the statistics that it sent before.
            balloon.refresh_stats()
        })
    }

    fn set_balloon(&mut self, size: Bytes) -> Result<BalloonStatus, ApiError> {
        if size >= self.config.memory {
            return Err(ApiError::new(
                ErrorCode::InvalidConfig,
                format!(
                    "the VM has {} of memory: the balloon must leave some",
                    self.config.memory
                ),
            ));
        }
        self.with_balloon(|balloon| {
            balloon.set_target_bytes(size.0);
            Ok(())
        })
    }

    fn console(&self) -> ConsoleInfo {
        ConsoleInfo {
            attached: self.handles.attached.load(Ordering::Relaxed),
            ..self.console.clone()
        }
    }

    fn snapshot(&mut self, request: SnapshotRequest, files: Vec<OwnedFd>, responder: Responder) {
        if let Err(error) = self.check_alive() {
            return responder.answer::<()>(Err(error));
        }
        let snapshot_source = Arc::clone(&self.handles.snapshot_source);
        self.on_thread("snapshot", move || {
            responder.answer(snapshot::take(&snapshot_source, &request, files));
        });
    }

    fn checkpoints(&self) -> Result<CheckpointList, ApiError> {
        Ok(snapshot::exclusive(&self.handles.snapshot_source)?
            .checkpoints
            .list())
    }

    fn checkpoint(&mut self, new: NewCheckpoint, files: Vec<OwnedFd>, responder: Responder) {
        if let Err(error) = self.check_alive() {
            return responder.answer::<()>(Err(error));
        }
        let source = Arc::clone(&self.handles.snapshot_source);
        self.on_thread("checkpoint", move || {
            responder.answer(checkpointing::take(&source, &new, files));
        });
    }

    fn remove_checkpoint(&mut self, name: &CheckpointName) -> Result<CheckpointList, ApiError> {
        let mut source = snapshot::exclusive(&self.handles.snapshot_source)?;
        source.checkpoints.remove(name)?;
        if source.checkpoints.is_empty() {
            source.dirty_tracker.forget_position();
        }
        Ok(source.checkpoints.list())
    }

    fn rewind(&mut self, name: CheckpointName, files: Vec<OwnedFd>, responder: Responder) {
        if self.handles.standby.is_some()
            && let Err(error) = self.check_alive()
        {
            return responder.answer::<()>(Err(error));
        }
        let source = Arc::clone(&self.handles.snapshot_source);
        let hub = Arc::clone(&self.handles.hub);
        self.on_thread("rewind", move || {
            let rewound = rewind::rewind(&source, &name, files);
            if rewound.is_ok() {
                let mut hub = hub.lock().unwrap_or_else(PoisonError::into_inner);
                hub.announce(&format!("the VM was rewound to the checkpoint `{name}`"));
            }
            responder.answer(rewound);
        });
    }

    fn migrate(&mut self, request: MigrationRequest, files: Vec<OwnedFd>, responder: Responder) {
        if let Err(error) = self.check_alive() {
            return responder.answer::<()>(Err(error));
        }
        let snapshot_source = Arc::clone(&self.handles.snapshot_source);
        let migration = Arc::clone(&self.handles.migration);
        let exit = self.exit.clone();
        migrate::send(snapshot_source, migration, request, files, responder, exit);
    }

    fn receive(&mut self, files: Vec<OwnedFd>, responder: Responder) {
        // From here on, the stream decides what becomes of the VM, and not the launcher.
        let _ = rustix::process::set_parent_process_death_signal(None);
        let snapshot_source = Arc::clone(&self.handles.snapshot_source);
        let migration = Arc::clone(&self.handles.migration);
        let (config, exit) = (self.config.clone(), self.exit.clone());
        migrate::receive(snapshot_source, migration, config, files, responder, exit);
    }

    fn migration(&self) -> MigrationStatus {
        MigrationStatus {
            custody: locked(&self.machine).custody(),
            cpu: self.handles.migration.cpu(),
            progress: self.handles.migration.progress(),
        }
    }

    fn confirm_migration(&mut self) -> Result<(), ApiError> {
        migrate::confirm(&self.handles.snapshot_source, &self.exit)
    }

    fn cancel_migration(&mut self) -> Result<(), ApiError> {
        migrate::cancel(&self.handles.snapshot_source, &self.exit)
    }

    fn touched_pages(&self) -> Result<TouchedPages, ApiError> {
        let Ok(snapshot_source) = self.handles.snapshot_source.try_lock() else {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                "a snapshot of this VM is being taken",
            ));
        };
        let (memory, pagemap) = (
            snapshot_source.dirty_tracker.memory(),
            snapshot_source.dirty_tracker.pagemap(),
        );
        let failed = |error: clone_memory::DirtyError| ApiError::internal(&error);
        Ok(TouchedPages {
            read: prefetch::runs(&memory.mapped_pages(pagemap).map_err(failed)?),
            written: prefetch::runs(&memory.private_pages(pagemap).map_err(failed)?),
        })
    }

    fn adopt(&mut self, adoption: &Adoption) -> Result<(), ApiError> {
        adoption.required_jail.check(&self.handles.jail)?;
        let Some(time) = self.handles.standby.take() else {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("the VM `{}` is no standby", self.config.name),
            ));
        };
        timeline(&self.timeline).reach(StartStage::Adopted);
        self.rename(&adoption.name);
        // An adopted standby does not end with the process that launched it.
        let _ = rustix::process::set_parent_process_death_signal(None);
        let mut machine = locked(&self.machine);
        let paused = machine.pause();
        paused
            .and_then(|mut paused| paused.set_time(&time))
            .map_err(machine_error)?;
        machine.resume()?;
        timeline(&self.timeline).reach(StartStage::Resumed);
        Ok(())
    }
}

fn no_balloon(name: &str) -> ApiError {
    ApiError::new(
        ErrorCode::Unavailable,
        format!("the VM `{name}` has no balloon"),
    )
    .advise("start it without --no-balloon")
}

/// Parses `smaps_rollup` (proc_pid_smaps(5)).
fn parse_memory_map(text: &str) -> MemoryStats {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok());
        kib.unwrap_or(0_u64) << 10
    };
    MemoryStats {
        guest_bytes: 0,
        resident_bytes: field("Rss:"),
        private_bytes: field("Private_Clean:") + field("Private_Dirty:"),
        swapped_bytes: field("Swap:"),
        guest: None,
    }
}

fn cpu_time() -> CpuStats {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to a writable `rusage`, which the call fills.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    // SAFETY: all zero is a valid `rusage` of integers, and so is what the call left.
    let usage = unsafe { usage.assume_init() };
    let micros = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    CpuStats {
        user_us: micros(usage.ru_utime),
        system_us: micros(usage.ru_stime),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_words() {
        let text = "00400000-7fff r--p 00000000 00:00 0 [rollup]\nRss:                1336 kB\n\
                    Pss:                 400 kB\nPrivate_Clean:        16 kB\n\
                    Private_Dirty:        92 kB\nSwap:                  4 kB\nSwapPss: 2 kB\n";
        let memory = parse_memory_map(text);
        assert_eq!(memory.resident_bytes, 1336 << 10);
        assert_eq!(memory.private_bytes, 108 << 10);
        assert_eq!(memory.swapped_bytes, 4 << 10);
    }

    #[test]
    fn processor_time_grows_with_work() {
        let before = cpu_time();
        let mut x = 1_u64;
        while cpu_time() == before {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        let after = cpu_time();
        assert!(after.user_us + after.system_us > before.user_us + before.system_us);
    }
}
