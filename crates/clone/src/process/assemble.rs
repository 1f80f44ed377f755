//! From open resources to a VM in the event loop.

use std::sync::{Arc, Mutex};

use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_memory::{GuestMemory, RamLayout};
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::{Kernel, Machine, MachineError, Parts};

use super::console::ConsoleHub;
use super::control::ControlServer;
use super::devices;
use super::open::Resources;
use super::vm::{Observed, Vm, VmHandle};
use crate::error::Result;
use crate::jail;
use crate::runtime::VmDir;

/// Builds the VM, paused before its guest's first instruction.
pub(super) fn assemble(
    dir: &VmDir,
    config: VmConfig,
    extra_arguments: &[String],
    resources: Resources,
    events: &mut EventLoop,
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

    let memory = guest_memory(&config)?;
    let devices = devices::build(&config, resources.devices, memory.ram(), events)?;
    let parts = Parts {
        kvm: resources.kvm,
        memory,
        vcpus: u8::try_from(config.vcpus).unwrap_or(u8::MAX),
        console: Box::new(output),
        devices: devices.slots,
        confine_vcpu: Arc::new(jail::confine_vcpu),
    };
    let mut machine = Machine::new(parts, events).map_err(told)?;
    let mut cmdline = config.kernel_cmdline();
    for argument in extra_arguments {
        cmdline = format!("{cmdline} {argument}");
    }
    let mut kernel = Kernel {
        image: resources.kernel,
        initrd: resources.initrd,
        cmdline,
    };
    machine.boot(&mut kernel).map_err(|error| {
        told(error).advise(format!(
            "check that {} is a Linux kernel for x86-64",
            config.kernel.display()
        ))
    })?;

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

    let vm = Vm::new(machine, hub, events).map_err(internal)?;
    let handle = VmHandle::new(
        &vm,
        dir,
        config,
        Observed {
            memory_map: resources.memory_map,
            attached,
            devices: devices.handles,
        },
    );
    let control_slot = events.reserve();
    let server = ControlServer::new(control_slot.clone(), resources.control, Box::new(handle))
        .map_err(internal)?;
    events.attach(&control_slot, Arc::new(Mutex::new(server)));
    Ok(vm)
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

/// A machine's error for the user.
pub(super) fn told(error: MachineError) -> ApiError {
    let told = ApiError::internal(&error);
    match error {
        MachineError::Missing(_) => ApiError {
            code: ErrorCode::HostUnsupported,
            ..told
        }
        .advise("use a newer kernel; 6.7 or newer has everything"),
        _ => told,
    }
}
