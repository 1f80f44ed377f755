//! The machine: RAM, CPUs, interrupts, buses and devices, assembled, and its life cycle.
//!
//! [`Machine::new`] assembles a machine, [`Machine::boot`] loads a kernel, and [`Machine::resume`]
//! runs the guest. The machine's devices are handlers of an [`EventLoop`] that the caller runs.
//! Save and restore use the contract that all devices share, so they name no kind of device.

mod memory_slots;
mod reset;
mod state;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clone_memory::layout::PAGE_SIZE;
use clone_memory::{GuestMemory, MemoryError, PageSet};
use kvm_bindings::{CpuId, KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Bytes, GuestAddress};

pub use crate::exit::{Exit, ExitSignal};
pub use state::{BoardState, GuestTime, MachineState, RestoreError, VmClock};

use crate::acpi::power::{self, EVENT_GENERATION, EVENT_POWER_BUTTON, PowerRegisters};
use crate::acpi::{self, SERIAL_PIN};
use crate::boot::{self, BootError, BootSource, VMGENID_ADDRESS};
use crate::bus::Bus;
use crate::devices::serial::{self, COM1_PORT, Serial};
use crate::event_loop::{EventLoop, Registrar};
use crate::irq::ioapic::{IOAPIC_BASE, IOAPIC_SIZE, Ioapic, PIN_COUNT};
use crate::irq::{IrqRoutes, KvmIrqRoutes};
use crate::pci::virtio_pci::{SharedVirtioDevice, VirtioPci};
use crate::pci::{
    ECAM_BASE, ECAM_SIZE, EcamWindow, MMIO32_BASE, MMIO32_SIZE, MmioWindow, PciBus, SLOT_COUNT,
};
use crate::vcpu::{
    Buses, CpuCeiling, EntryTime, StateFormat, Vcpu, VcpuContext, VcpuError, cpuid_of,
};
use crate::virtio::DeviceError;

/// The most CPUs that a machine may have.
pub const MAX_VCPUS: u8 = 32;

/// What went wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM refused a request.
    #[error("KVM: cannot {action}: {source}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// The host's KVM is too old, or of another kind.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// More CPUs or devices than the machine has room for.
    #[error("{asked} {what} were asked for, and {limit} are possible")]
    TooMany {
        /// The kind of thing that there are too many of.
        what: &'static str,
        /// How many were asked for.
        asked: usize,
        /// The most that there can be.
        limit: usize,
    },
    /// A CPU failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// RAM could not be set up.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host refused a resource, such as a file descriptor.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// A saved state does not fit this machine.
    #[error("saved machine state refused: {0}")]
    State(String),
}

impl MachineError {
    fn kvm(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { action, source }
    }

    fn host(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }
}

/// A virtio device for the machine, and the registrar that it was built with (if it needed one).
pub struct DeviceSlot {
    /// The device.
    pub device: SharedVirtioDevice,
    /// The device's slot in the event loop.
    pub registrar: Registrar,
}

/// The parts that a machine is assembled from. All host resources are open already.
pub struct Parts {
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Receives what the serial console prints. It must not block.
    pub console: serial::Output,
    /// The virtio devices, in slot order from slot 1.
    pub devices: Vec<DeviceSlot>,
    /// Confines each vCPU thread (by seccomp) before it runs the guest.
    pub confine_vcpu: Arc<dyn Fn() -> io::Result<()> + Send + Sync>,
}

/// The kernel that a machine boots.
pub struct Kernel {
    /// An ELF `vmlinux` or a bzImage.
    pub image: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
}

type SharedTransport = Arc<Mutex<VirtioPci>>;

/// A virtual machine, owned by the event loop's thread.
///
/// Fields drop in order: CPUs stop before the memory that they run in is unmapped.
pub struct Machine {
    vcpus: Vec<Vcpu>,
    transports: Vec<SharedTransport>,
    ioapic: Arc<Ioapic>,
    serial: Arc<Serial>,
    power: Arc<PowerRegisters>,
    exit: ExitSignal,
    entry_time: EntryTime,
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    running: bool,
}

/// A machine that is paused, and stays so while this exists. Only a paused machine can be saved,
/// restored, reset, or set to another time.
pub struct PausedMachine<'m>(&'m mut Machine);

impl std::ops::Deref for PausedMachine<'_> {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        self.0
    }
}

fn locked(transport: &SharedTransport) -> MutexGuard<'_, VirtioPci> {
    // A panic in a device leaves it suspect, but pausing and dropping it is still right.
    transport.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// Assembles a machine, which is paused before its first instruction. Its devices become
    /// handlers of `events`. [`Machine::boot`] or [`PausedMachine::restore`] gives it a guest.
    pub fn new(parts: Parts, events: &mut EventLoop) -> Result<Self, MachineError> {
        check_limits(&parts)?;
        let board = BoardState::fresh();
        let kvm = parts.kvm;
        let exit = ExitSignal::new().map_err(MachineError::host("make an eventfd"))?;
        let vm = Arc::new(create_vm(&kvm)?);
        memory_slots::register(&vm, &parts.memory)?;
        let irq_routes: Arc<dyn IrqRoutes> = Arc::new(KvmIrqRoutes::new(Arc::clone(&vm)));
        let ioapic = Arc::new(Ioapic::new(Arc::clone(&irq_routes), board.ioapic));
        let serial = Serial::new(board.serial, Arc::clone(&ioapic), SERIAL_PIN, parts.console);
        let serial = Arc::new(serial.map_err(MachineError::host("make the serial console"))?);
        let power = Arc::new(PowerRegisters::new(Arc::clone(&ioapic), exit.clone()));
        let pci = PciBus::new();
        let transports = plug(parts.devices, &pci, &irq_routes, &parts.memory, events)?;
        let buses = Arc::new(buses(&serial, &power, &ioapic, &pci));
        let ceiling = CpuCeiling::new(&kvm, parts.vcpus)?;
        let format = StateFormat::new(&ceiling, StateFormat::xsave_capability(&vm));
        let entry_time = EntryTime::default();
        let context = VcpuContext {
            vm: &vm,
            ceiling: Arc::new(ceiling),
            buses,
            exit: exit.clone(),
            entry_time: entry_time.clone(),
            format: Arc::new(format),
            confine: parts.confine_vcpu,
        };
        let vcpus = (0..parts.vcpus)
            .map(|id| Vcpu::new(&context, id))
            .collect::<Result<_, _>>()?;
        let memory = Arc::new(parts.memory);
        Ok(Self {
            vcpus,
            transports,
            ioapic,
            serial,
            power,
            exit,
            entry_time,
            vm,
            memory,
            running: false,
        })
    }

    /// Loads a kernel into RAM and sets the first CPU to the kernel's entry point.
    pub fn boot(&mut self, kernel: &mut Kernel) -> Result<(), MachineError> {
        let ram = self.memory.ram();
        let rsdp = acpi::write_tables(ram, self.vcpus.len() as u8).map_err(BootError::Write)?;
        let source = BootSource {
            kernel: &mut kernel.image,
            initrd: kernel.initrd.as_mut(),
            cmdline: &kernel.cmdline,
            rsdp,
        };
        let entry = boot::load(ram, source)?;
        Ok(self.vcpus[0].start(entry)?)
    }

    /// Stops everything: afterwards nothing changes RAM, and the state can be saved. Does nothing
    /// when the machine is paused already. It stays paused until [`Machine::resume`].
    ///
    /// # Errors
    /// Where a device cannot come to rest.
    pub fn pause(&mut self) -> Result<PausedMachine<'_>, MachineError> {
        if self.running {
            self.stop()?;
        }
        Ok(PausedMachine(self))
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        // All CPUs are asked to park before the first is waited for, so that they stop at the same
        // time.
        self.vcpus.iter().for_each(Vcpu::park);
        self.vcpus.iter().for_each(Vcpu::wait_parked);
        self.running = false;
        for transport in &self.transports {
            locked(transport).pause()?;
        }
        Ok(())
    }

    /// Resumes the machine's devices and vCPUs. Does nothing when the machine is running already.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if self.running {
            return Ok(());
        }
        for transport in &self.transports {
            locked(transport).resume()?;
        }
        self.vcpus.iter().for_each(Vcpu::run);
        self.running = true;
        Ok(())
    }

    /// Whether the machine is running.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// The reason for which the machine ended, or `None` before that. [`Machine::exit_signal`]
    /// notifies an event loop of it.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.get()
    }

    /// The signal that is readable once the machine has ended. Any holder of it may end the
    /// machine.
    pub fn exit_signal(&self) -> ExitSignal {
        self.exit.clone()
    }

    /// The time at which the guest first ran in this machine, which is later than at its save.
    pub fn entry_time(&self) -> EntryTime {
        self.entry_time.clone()
    }

    /// Presses the power button, which asks the guest to switch itself off.
    pub fn press_power_button(&self) {
        self.power.raise(EVENT_POWER_BUTTON);
    }

    /// Gives the guest a new generation id, by which it learns that it is a clone or was restored,
    /// and draws new random numbers. Source: Microsoft's "Virtual Machine Generation ID", Linux
    /// `drivers/virt/vmgenid.c`.
    ///
    /// # Errors
    /// [`MachineError::State`] where the machine has no RAM there.
    pub fn set_generation(&self, id: [u8; 16]) -> Result<(), MachineError> {
        let ram = self.memory.ram();
        ram.write_slice(&id, GuestAddress(VMGENID_ADDRESS))
            .map_err(|error| {
                MachineError::State(format!("RAM has no place for a generation id: {error}"))
            })?;
        self.power.raise(EVENT_GENERATION);
        Ok(())
    }

    /// Asks KVM to map pages of RAM that the guest will soon touch, where KVM can map pages ahead.
    ///
    /// # Errors
    /// Those of KVM, except that KVM cannot map pages ahead.
    pub fn pre_fault(&self, pages: &PageSet) -> Result<(), MachineError> {
        let layout = self.memory.layout();
        let ranges = layout.ranges().flat_map(|ram| {
            let first = ram.offset / PAGE_SIZE;
            let here = first..first + ram.size / PAGE_SIZE;
            pages.runs().iter().filter_map(move |run| {
                let pages = run.start.max(here.start)..run.end.min(here.end);
                let at = |page: u64| ram.start.0 + (page - here.start) * PAGE_SIZE;
                (!pages.is_empty()).then(|| at(pages.start)..at(pages.end))
            })
        });
        // Any CPU will do, because all share what is mapped.
        Ok(self.vcpus[0].pre_fault(ranges.collect())?)
    }

    /// The serial console, by which input reaches the guest.
    pub fn serial(&self) -> Arc<Serial> {
        Arc::clone(&self.serial)
    }

    /// Guest RAM. A holder of it may read it while the machine runs.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
}

fn check_limits(parts: &Parts) -> Result<(), MachineError> {
    let check = |what, asked: usize, limit: usize| {
        if asked > limit {
            Err(MachineError::TooMany { what, asked, limit })
        } else {
            Ok(())
        }
    };
    check("vCPUs", usize::from(parts.vcpus), usize::from(MAX_VCPUS))?;
    check("devices", parts.devices.len(), SLOT_COUNT - 1)?;
    if parts.vcpus == 0 {
        return Err(MachineError::TooMany {
            what: "vCPUs (at least 1 is needed)",
            asked: 0,
            limit: 32,
        });
    }
    Ok(())
}

/// Creates a VM with in-kernel local APICs and no other interrupt hardware of a PC.
fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    for (capability, name) in [
        (Cap::SplitIrqchip, "a split irqchip (KVM_CAP_SPLIT_IRQCHIP)"),
        (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
        (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
        (
            Cap::SignalMsi,
            "message signalled interrupts (KVM_CAP_SIGNAL_MSI)",
        ),
        (
            Cap::ImmediateExit,
            "immediate exit (KVM_CAP_IMMEDIATE_EXIT)",
        ),
        (
            Cap::TscDeadlineTimer,
            "the TSC-deadline timer (KVM_CAP_TSC_DEADLINE_TIMER)",
        ),
    ] {
        if !kvm.check_extension(capability) {
            return Err(MachineError::Missing(name));
        }
    }
    let vm = kvm.create_vm().map_err(MachineError::kvm("create a VM"))?;
    // Intel's CPUs need three pages for real mode, above our highest device and below the LAPIC.
    vm.set_tss_address(0xFFFB_D000)
        .map_err(MachineError::kvm("set the TSS address"))?;
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = PIN_COUNT as u64;
    vm.enable_cap(&split)
        .map_err(MachineError::kvm("split the irqchip"))?;
    Ok(vm)
}

/// The CPUID of a machine's only CPU at a boot on this host.
pub(crate) fn boot_cpuid(kvm: &Kvm) -> Result<CpuId, MachineError> {
    let vm = create_vm(kvm)?;
    let vcpu = vm
        .create_vcpu(0)
        .map_err(MachineError::kvm("create a vCPU"))?;
    CpuCeiling::new(kvm, 1)?.set_cpuid(&vcpu, 0)?;
    Ok(cpuid_of(&vcpu)?)
}

/// Puts each device into a slot, with a BAR, in order.
fn plug(
    devices: Vec<DeviceSlot>,
    pci: &Arc<PciBus>,
    irq_routes: &Arc<dyn IrqRoutes>,
    memory: &GuestMemory,
    events: &mut EventLoop,
) -> Result<Vec<SharedTransport>, MachineError> {
    let mut transports = Vec::with_capacity(devices.len());
    for (slot, DeviceSlot { device, registrar }) in (1..).zip(devices) {
        let bar = MMIO32_BASE as u32 + slot as u32 * VirtioPci::BAR_SIZE;
        let ram = memory.ram().clone();
        let transport = VirtioPci::new(device, bar, Arc::clone(irq_routes), ram, registrar.clone())
            .map_err(MachineError::host("connect a device"))?;
        let transport = Arc::new(Mutex::new(transport));
        pci.insert(slot, transport.clone());
        events.attach(&registrar, transport.clone());
        transports.push(transport);
    }
    Ok(transports)
}

fn buses(
    serial: &Arc<Serial>,
    power: &Arc<PowerRegisters>,
    ioapic: &Arc<Ioapic>,
    pci: &Arc<PciBus>,
) -> Buses {
    let (mut ports, mut mmio) = (Bus::default(), Bus::default());
    ports.insert(u64::from(COM1_PORT), serial::PORT_COUNT, serial.clone());
    ports.insert(u64::from(power::PORT_BASE), power::PORT_SIZE, power.clone());
    mmio.insert(
        MMIO32_BASE,
        MMIO32_SIZE,
        Arc::new(MmioWindow(Arc::clone(pci))),
    );
    mmio.insert(ECAM_BASE, ECAM_SIZE, Arc::new(EcamWindow(Arc::clone(pci))));
    mmio.insert(IOAPIC_BASE, IOAPIC_SIZE, ioapic.clone());
    Buses { ports, mmio }
}
