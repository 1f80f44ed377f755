//! Assembles a VM in the event loop from open resources.

use std::fs::File;
use std::sync::{Arc, Mutex};

use clone_api::config::{DiskConfig, Overlay};
use clone_api::control::{Custody, StartStage};
use clone_api::jail::JailStatus;
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_memory::{GuestMemory, RamLayout};
use clone_start::error::Result;
use clone_start::{VmDir, cpu};
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::{Kernel, Machine, MachineState, Parts};
use clone_vmm::snapshot::CpuProfile;
use kvm_ioctls::Kvm;

use super::console::ConsoleHub;
use super::control::ControlServer;
use super::dirty_tracker::DirtyTracker;
use super::machine::{GuestMachine, machine_error};
use super::migrate::Migration;
use super::open::{BootFiles, OpenOrigin, Resources};
use super::prefetch::PrefetchPages;
use super::reboot::Reboot;
use super::released::Released;
use super::run_once::RunOnce;
use super::snapshot::{DiskWrites, SnapshotDisk};
use super::timeline::Timeline;
use super::vm::{Vm, VmHandle, VmHandles};
use super::{devices, prefetch};

/// Builds the VM inside `jail`, paused before its guest's first instruction.
pub(super) fn assemble(
    dir: &VmDir,
    (config, jail): (VmConfig, JailStatus),
    extra_arguments: &[String],
    kvm: Kvm,
    resources: Resources,
    events: &mut EventLoop,
    mut timeline: Timeline,
) -> Result<Vm> {
    let internal = |error: std::io::Error| ApiError::internal(&error);
    let console_slot = events.reserve();
    let (hub, output) = ConsoleHub::new(
        console_slot.clone(),
        resources.console,
        resources.console_log,
    )
    .map_err(internal)?;
    let hub = Arc::new(Mutex::new(hub));
    events.attach(&console_slot, hub.clone());

    let guest = Guest::from_origin(resources.origin, &config)?;
    timeline.reach(StartStage::Mapped);
    let released = Released::default();
    let memory = &guest.memory;
    let devices = devices::build(&config, resources.devices, memory, &released, events)?;
    let time = guest.state().map(MachineState::time);
    let parts = Parts {
        kvm,
        memory: guest.memory,
        vcpus: u8::try_from(config.vcpus).unwrap_or(u8::MAX),
        console: Box::new(output),
        devices: devices.slots,
        confine_vcpu: Arc::new(crate::jail::confine_vcpu),
    };
    let boot_files = guest.boot.as_ref().ok().map(BootFiles::try_clone);
    let boot_files = boot_files.transpose().map_err(internal)?;
    let mut kernel = guest
        .boot
        .map(|files| files.kernel(&config, extra_arguments));
    let mut cpu_features = None;
    let machine = match (guest.source, &mut kernel) {
        // Memory, disks and state come later, into a machine that has done nothing yet.
        _ if resources.incoming => Machine::new(parts, events).map_err(machine_error)?,
        (Source::State(state, prefetch_pages), _) => {
            let machine = restore(
                parts,
                &state,
                prefetch_pages.as_ref(),
                events,
                &mut timeline,
            )?;
            let profile = CpuProfile::of_saved(&state.vcpus);
            cpu_features = Some(cpu::features_of(profile));
            // A saved VM that goes on is no new generation.
            if guest.run_once.is_none() {
                let generation = clone_base::random::bytes().map_err(internal)?;
                machine.set_generation(generation).map_err(machine_error)?;
            }
            machine
        }
        (Source::Boot, Ok(kernel)) => boot(parts, kernel, &config, events)?,
        // A boot opens its kernel, so this case does not occur.
        (Source::Boot, Err(missing)) => {
            return Err(ApiError::new(ErrorCode::Internal, missing.clone()));
        }
    };
    let serial = machine.serial();
    let drained = serial.drained().map_err(internal)?;
    let mut console = hub
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    console
        .connect(Box::new(serial), drained)
        .map_err(internal)?;
    let attached = console.attached();
    drop(console);

    let memory = Arc::clone(machine.memory());
    let mut dirty_tracker = DirtyTracker::new(memory, resources.pagemap, released);
    if guest.observed {
        // Tracked memory faults page by page, so the tracker shows exactly the pages that are
        // touched.
        let begun = dirty_tracker.begin();
        begun.map_err(|error| ApiError::internal(&error))?;
    }
    let disks = devices.handles.disks.iter().enumerate();
    let disks = disks.map(|(index, disk)| SnapshotDisk {
        disk: Arc::clone(disk),
        parent_layers: guest.disk_layers.get(index).copied().unwrap_or(0),
        writes: config
            .disks
            .get(index)
            .map_or(DiskWrites::Refused, writes_of),
    });
    let disks = disks.collect();
    timeline.watch(machine.entry_time());
    let timeline = Arc::new(Mutex::new(timeline));
    let custody = match resources.incoming {
        true => Custody::Incoming,
        false => Custody::Here,
    };
    let mut machine = GuestMachine::new(machine, custody);
    if let Some(mark) = guest.run_once {
        machine.in_saved_state(mark).map_err(internal)?;
    }
    let waits = guest.standby || resources.incoming;
    let vm = Vm::new(
        machine,
        Arc::clone(&hub),
        timeline,
        waits,
        guest.locks,
        events,
    );
    let mut vm = vm.map_err(internal)?;
    let snapshot_source = vm.snapshot_source(dirty_tracker, disks, boot_files);
    vm.on_reboot(Reboot::new(
        config.on_reboot,
        kernel,
        Arc::clone(&snapshot_source),
    ));
    let handle = VmHandle::new(
        &vm,
        dir,
        config,
        VmHandles {
            memory_map: resources.memory_map,
            attached,
            devices: devices.handles,
            snapshot_source,
            migration: Arc::new(Migration::new(cpu_features)),
            jail,
            hub,
            standby: time.filter(|_| guest.standby),
        },
    );
    let control_slot = events.reserve();
    let server = ControlServer::new(control_slot.clone(), resources.control, Box::new(handle))
        .map_err(internal)?;
    events.attach(&control_slot, Arc::new(Mutex::new(server)));
    Ok(vm)
}

/// The parts of the guest that exist before its machine is built.
struct Guest {
    memory: GuestMemory,
    source: Source,
    /// The kernel to boot, or the reason why there is none.
    boot: std::result::Result<BootFiles, String>,
    disk_layers: Vec<usize>,
    standby: bool,
    observed: bool,
    locks: Vec<File>,
    run_once: Option<RunOnce>,
}

enum Source {
    Boot,
    State(Box<MachineState>, Option<PrefetchPages>),
}

impl Guest {
    fn from_origin(origin: OpenOrigin, config: &VmConfig) -> Result<Self> {
        match origin {
            OpenOrigin::Boot(files) => Ok(Self {
                memory: guest_memory(config)?,
                source: Source::Boot,
                boot: Ok(files),
                disk_layers: Vec::new(),
                standby: false,
                observed: false,
                locks: Vec::new(),
                run_once: None,
            }),
            OpenOrigin::Fork(fork) => {
                let layout = *fork.memory.layout();
                let memory = GuestMemory::from_layers(&layout, &fork.memory);
                let memory = memory.map_err(|error| ApiError::internal(&error))?;
                let prefetch_pages = fork.prefetch.and_then(|file| prefetch::read(file, &memory));
                if let Some(prefetch_pages) = &prefetch_pages {
                    prefetch_pages.map(&memory);
                }
                Ok(Self {
                    memory,
                    source: Source::State(Box::new(fork.state), prefetch_pages),
                    boot: fork.boot,
                    disk_layers: fork.disk_layers,
                    standby: fork.standby,
                    observed: fork.observed,
                    locks: fork.locks,
                    run_once: fork.run_once,
                })
            }
        }
    }

    fn state(&self) -> Option<&MachineState> {
        match &self.source {
            Source::Boot => None,
            Source::State(state, _) => Some(state),
        }
    }
}

fn boot(
    parts: Parts,
    kernel: &mut Kernel,
    config: &VmConfig,
    events: &mut EventLoop,
) -> Result<Machine> {
    let mut machine = Machine::new(parts, events).map_err(machine_error)?;
    machine.boot(kernel).map_err(|error| {
        machine_error(error).advise(format!(
            "check that {} is a Linux kernel for x86-64",
            config.kernel.display()
        ))
    })?;
    Ok(machine)
}

fn restore(
    parts: Parts,
    state: &MachineState,
    prefetch_pages: Option<&PrefetchPages>,
    events: &mut EventLoop,
    timeline: &mut Timeline,
) -> Result<Machine> {
    let machine = Machine::restore(parts, state, events).map_err(machine_error)?;
    timeline.reach(StartStage::Built);
    if let Some(prefetch_pages) = prefetch_pages {
        machine
            .pre_fault(&prefetch_pages.all())
            .map_err(machine_error)?;
        timeline.reach(StartStage::PreFaulted);
    }
    Ok(machine)
}

/// Where the guest's writes to a disk go.
fn writes_of(disk: &DiskConfig) -> DiskWrites {
    match disk.overlay {
        _ if disk.read_only => DiskWrites::Refused,
        Overlay::Ephemeral => DiskWrites::Layer,
        Overlay::None | Overlay::Kept(_) => DiskWrites::Kept,
    }
}

fn guest_memory(config: &VmConfig) -> Result<GuestMemory> {
    let size = config.memory;
    let layout = RamLayout::new(size.0).ok_or_else(|| {
        ApiError::new(
            ErrorCode::InvalidConfig,
            format!("{size} cannot be laid out as RAM"),
        )
    })?;
    GuestMemory::anonymous(&layout).map_err(|error| {
        ApiError::internal(&error).advise(format!(
            "give it less --memory than {size}, or see `ulimit -v` and vm.overcommit_memory"
        ))
    })
}
