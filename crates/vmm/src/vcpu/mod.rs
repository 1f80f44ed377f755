//! The CPUs. Each is a thread, which runs the guest and handles its port and memory accesses.
//!
//! A thread has one of three modes: running, parked (paused, or not started yet) or ended. To get a
//! thread out of the guest, its `immediate_exit` flag is set and it is sent a signal; the flag
//! makes KVM return even if the signal came a moment too early. A thread looks at its mode only
//! when KVM says it was interrupted, which also lets KVM finish an access that was under way, so
//! that the state of a parked CPU is complete.

mod ceiling;
mod cpuid;
mod entry_time;
pub(crate) mod features;
mod pre_fault;
mod registers;
mod saved;
mod shortage;
mod state;

use std::ops::Range;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, thread};

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

pub(crate) use self::ceiling::vendor;
pub use self::ceiling::{CpuCeiling, Refusal};
pub use self::entry_time::{EntryTime, monotonic_ns};
pub use self::saved::VcpuState;
use self::shortage::MemoryShortage;
pub use self::state::StateFormat;
pub(crate) use self::state::cpuid_of;
use crate::boot::Entry;
use crate::bus::Bus;
use crate::exit::{Exit, ExitSignal};

/// The stack size of a vCPU thread, which only passes accesses on to devices.
const STACK_BYTES: usize = 128 << 10;

/// Errors of CPUs.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused a request.
    #[error("KVM: cannot {action}: {source}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// The saved state does not fit this host.
    #[error("saved CPU state refused: {0}")]
    Corrupt(&'static str),
    /// The host refuses a register value that the guest relies on.
    #[error("this host refuses the saved value {data:#x} of MSR {index:#x}")]
    MsrRefused {
        /// The register.
        index: u32,
        /// Its saved value.
        data: u64,
    },
    /// A CPU of this machine could not have the saved state on this host.
    #[error("the saved state of CPU {vcpu} is refused: {refusal}")]
    Refused {
        /// The CPU.
        vcpu: u8,
        /// Why.
        refusal: Refusal,
    },
    /// The CPU's thread could not be started.
    #[error("cannot start a vCPU thread: {0}")]
    Thread(#[source] io::Error),
    /// The thread has ended after a panic in a device.
    #[error("the thread of vCPU {0} has ended")]
    Gone(u8),
}

impl VcpuError {
    fn kvm(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { action, source }
    }
}

/// The buses that a CPU's accesses go to.
pub struct Buses {
    /// I/O ports.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Parked,
    Running,
    Ended,
}

/// A request to a parked CPU.
enum Job {
    Save(mpsc::Sender<Result<VcpuState, VcpuError>>),
    Check(
        Box<VcpuState>,
        mpsc::Sender<Result<CheckedState, VcpuError>>,
    ),
    Restore(CheckedState, mpsc::Sender<Result<(), VcpuError>>),
    SetTsc(u64, mpsc::Sender<Result<(), VcpuError>>),
    PreFault(Vec<Range<u64>>, mpsc::Sender<Result<(), VcpuError>>),
    Start(Entry, mpsc::Sender<Result<(), VcpuError>>),
    Reset(mpsc::Sender<Result<(), VcpuError>>),
}

/// A saved state that fits the CPU which checked it.
pub struct CheckedState(Box<VcpuState>);

struct Control {
    wanted: Mode,
    /// The thread's report of its own state.
    present: Mode,
    jobs: Vec<Job>,
}

struct Shared {
    id: u8,
    control: Mutex<Control>,
    /// Notified by either side whenever `control` has changed.
    changed: Condvar,
    exit: ExitSignal,
    format: Arc<StateFormat>,
    ceiling: Arc<CpuCeiling>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, control: MutexGuard<'a, Control>) -> MutexGuard<'a, Control> {
        self.changed
            .wait(control)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the CPU is to run, but at most for `pause`. Returns whether it still is to run.
    fn stays_running_for(&self, pause: Duration) -> bool {
        let is_wanted = |control: &mut Control| control.wanted == Mode::Running;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), pause, is_wanted);
        let (control, _) = waited.unwrap_or_else(PoisonError::into_inner);
        control.wanted == Mode::Running
    }
}

/// The `immediate_exit` byte of a CPU's `kvm_run` page, writable from other threads.
struct ImmediateExit(*const AtomicU8);

// SAFETY: the pointer is to one byte of the vCPU's shared page, which KVM and any thread may read
// and write at any time (that is its purpose); it is only used as an atomic.
unsafe impl Send for ImmediateExit {}

/// A handle of a CPU, for other threads than its own.
pub struct Vcpu {
    shared: Arc<Shared>,
    immediate_exit: ImmediateExit,
    thread: Option<JoinHandle<()>>,
}

/// The parts that all CPUs of a machine share.
pub struct VcpuContext<'a> {
    /// The VM.
    pub vm: &'a VmFd,
    /// The features that CPUs get at a boot, and the most that saved CPUs may have.
    pub ceiling: Arc<CpuCeiling>,
    /// The buses for the CPUs' accesses.
    pub buses: Arc<Buses>,
    /// The signal that ends the machine.
    pub exit: ExitSignal,
    /// Records the first entry into the guest.
    pub entry_time: EntryTime,
    /// The format of saved CPU states on this host.
    pub format: Arc<StateFormat>,
    /// Called first on the CPU's own thread, to confine it (by seccomp). An error ends the thread.
    pub confine: Arc<dyn Fn() -> io::Result<()> + Send + Sync>,
}

impl Vcpu {
    /// Creates CPU `id` and its thread, parked. The first CPU waits for [`Vcpu::start`], the
    /// others for the guest to wake them, in KVM.
    pub fn new(context: &VcpuContext<'_>, id: u8) -> Result<Self, VcpuError> {
        let kvm = VcpuError::kvm;
        let mut fd = context
            .vm
            .create_vcpu(u64::from(id))
            .map_err(kvm("create a vCPU"))?;
        context.ceiling.set_cpuid(&fd, id)?;
        registers::set_firmware_msrs(&fd).map_err(kvm("set the firmware's MSRs"))?;
        let power_on = state::save(&fd, &context.format)?.into_power_on();
        let run = fd.get_kvm_run();
        let immediate_exit = ImmediateExit((&raw const run.immediate_exit).cast());
        let shared = Arc::new(Shared {
            id,
            control: Mutex::new(Control {
                wanted: Mode::Parked,
                present: Mode::Parked,
                jobs: Vec::new(),
            }),
            changed: Condvar::new(),
            exit: context.exit.clone(),
            format: Arc::clone(&context.format),
            ceiling: Arc::clone(&context.ceiling),
        });
        install_signal_handler();
        let worker = Worker {
            shared: Arc::clone(&shared),
            fd,
            power_on,
            has_run: false,
            buses: Arc::clone(&context.buses),
            entry_time: context.entry_time.clone(),
        };
        let confine = Arc::clone(&context.confine);
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK_BYTES)
            .spawn(move || worker.main(confine.as_ref()))
            .map_err(VcpuError::Thread)?;
        Ok(Self {
            shared,
            immediate_exit,
            thread: Some(thread),
        })
    }

    fn job<T>(
        &self,
        make: impl FnOnce(mpsc::Sender<Result<T, VcpuError>>) -> Job,
    ) -> Result<T, VcpuError> {
        let (reply, answer) = mpsc::channel();
        self.shared.lock().jobs.push(make(reply));
        self.shared.changed.notify_all();
        answer
            .recv()
            .unwrap_or(Err(VcpuError::Gone(self.shared.id)))
    }

    /// Sets the registers of a parked CPU so that it starts the kernel when it runs.
    pub fn start(&self, entry: Entry) -> Result<(), VcpuError> {
        self.job(|reply| Job::Start(entry, reply))
    }

    /// The state of a parked CPU.
    pub fn save(&self) -> Result<VcpuState, VcpuError> {
        self.job(Job::Save)
    }

    /// Checks that this parked CPU can take over `state`. Nothing is changed.
    ///
    /// # Errors
    /// [`VcpuError::Refused`] or [`VcpuError::Corrupt`] where the state does not fit.
    pub fn check(&self, state: VcpuState) -> Result<CheckedState, VcpuError> {
        self.job(|reply| Job::Check(Box::new(state), reply))
    }

    /// Puts a parked CPU into a state that it has checked, whether the CPU has run before or not.
    ///
    /// # Errors
    /// The errors of KVM. The CPU is of no use then until it is reset or restored.
    pub fn restore(&self, state: CheckedState) -> Result<(), VcpuError> {
        self.job(|reply| Job::Restore(state, reply))
    }

    /// Puts a parked CPU into the state that it had when it was new.
    pub fn reset(&self) -> Result<(), VcpuError> {
        self.job(Job::Reset)
    }

    /// Sets the time-stamp counter of a parked CPU.
    pub fn set_tsc(&self, tsc: u64) -> Result<(), VcpuError> {
        self.job(|reply| Job::SetTsc(tsc, reply))
    }

    /// Asks KVM to map guest-physical ranges before they are used, as far as the host can.
    pub fn pre_fault(&self, ranges: Vec<Range<u64>>) -> Result<(), VcpuError> {
        self.job(|reply| Job::PreFault(ranges, reply))
    }

    /// Asks the thread to run or to park, without waiting; see [`Vcpu::wait_parked`].
    fn want(&self, mode: Mode) {
        let mut control = self.shared.lock();
        if control.wanted != Mode::Ended {
            control.wanted = mode;
        }
        if mode != Mode::Running && control.present == Mode::Running {
            self.interrupt();
        }
        drop(control);
        self.shared.changed.notify_all();
    }

    /// Makes the thread leave the guest. It must be called while `control` is locked and has the
    /// thread running: the thread parks and ends under the same lock, so it still exists.
    fn interrupt(&self) {
        // SAFETY: the page is mapped as long as the thread owns the vCPU, and it does (see above).
        unsafe { &*self.immediate_exit.0 }.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if let Some(thread) = &self.thread {
            // SAFETY: the thread was not joined (only `drop` does that), so its id is valid.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }

    /// Lets the CPU run.
    pub fn run(&self) {
        self.want(Mode::Running);
    }

    /// Asks the CPU to park.
    pub fn park(&self) {
        self.want(Mode::Parked);
    }

    /// Waits until the CPU has parked (or ended, with the machine).
    pub fn wait_parked(&self) {
        let mut control = self.shared.lock();
        while control.present == Mode::Running && control.wanted != Mode::Running {
            control = self.shared.wait(control);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.want(Mode::Ended);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.shared.id, "vCPU thread panicked");
        }
    }
}

fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Does nothing, because the signal only has to interrupt `KVM_RUN`.
fn install_signal_handler() {
    static INSTALLED: Once = Once::new();
    extern "C" fn nothing(_: i32) {}
    INSTALLED.call_once(|| {
        // SAFETY: an all-zero `sigaction` is valid: no flags, empty mask, default action.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        // SAFETY: the handler does nothing, so it is async-signal-safe; the pointers are to a live
        // structure and null.
        let result = unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) };
        debug_assert_eq!(result, 0, "SIGRTMIN can be handled");
    });
}

/// The inside of a vCPU thread.
struct Worker {
    shared: Arc<Shared>,
    fd: VcpuFd,
    /// The state of the new CPU.
    power_on: VcpuState,
    /// Whether the CPU has entered the guest, after which KVM takes no other CPUID.
    has_run: bool,
    buses: Arc<Buses>,
    entry_time: EntryTime,
}

impl Worker {
    fn main(mut self, confine: &dyn Fn() -> io::Result<()>) {
        if let Err(error) = confine() {
            self.end(Exit::Crash(format!(
                "cannot confine vCPU {}: {error}",
                self.shared.id
            )));
        }
        while self.parked() {
            self.run();
        }
    }

    /// Waits until the CPU is to run, and does jobs meanwhile. Returns `false` when the thread must
    /// end.
    fn parked(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut control = shared.lock();
        control.present = Mode::Parked;
        shared.changed.notify_all();
        loop {
            if let Some(job) = control.jobs.pop() {
                drop(control);
                self.work(job);
                control = shared.lock();
                continue;
            }
            match control.wanted {
                Mode::Running => break,
                Mode::Ended => {
                    control.present = Mode::Ended;
                    return false;
                }
                Mode::Parked => control = shared.wait(control),
            }
        }
        // The flag is cleared before others can see that the CPU runs, and so before they can set
        // it again.
        self.fd.set_kvm_immediate_exit(0);
        control.present = Mode::Running;
        true
    }

    fn work(&self, job: Job) {
        // The requester may be gone, and then needs no answer.
        match job {
            Job::Save(reply) => {
                let _ = reply.send(state::save(&self.fd, &self.shared.format));
            }
            Job::Check(state, reply) => {
                let shared = &self.shared;
                let rules = (&*shared.format, &*shared.ceiling);
                let checked = state::check(&self.fd, shared.id, &state, self.has_run, rules);
                let _ = reply.send(checked.map(|()| CheckedState(state)));
            }
            Job::Restore(CheckedState(state), reply) => {
                let format = &self.shared.format;
                let restored = match self.has_run {
                    true => state::restore_in_place(&self.fd, &state, format),
                    false => state::restore(&self.fd, &state, format),
                };
                let _ = reply.send(restored);
            }
            Job::SetTsc(tsc, reply) => {
                let _ = reply.send(state::set_tsc(&self.fd, tsc));
            }
            Job::PreFault(ranges, reply) => {
                let _ = reply.send(pre_fault::pre_fault(&self.fd, &ranges));
            }
            Job::Start(entry, reply) => {
                let set = registers::set(&self.fd, entry);
                let _ = reply.send(set.map_err(VcpuError::kvm("set the first registers")));
            }
            Job::Reset(reply) => {
                let _ = reply.send(state::reset(&self.fd, &self.power_on, &self.shared.format));
            }
        }
    }

    /// Runs the guest until the CPU is to park, or the guest cannot run any more.
    fn run(&mut self) {
        self.entry_time.note();
        self.has_run = true;
        let mut shortage = MemoryShortage::default();
        loop {
            let result = self.fd.run();
            if result.is_ok() {
                shortage.is_over();
            }
            match result {
                Ok(VcpuExit::IoOut(port, data)) => self.buses.ports.write(u64::from(port), data),
                Ok(VcpuExit::IoIn(port, data)) => self.buses.ports.read(u64::from(port), data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.buses.mmio.write(address, data),
                Ok(VcpuExit::MmioRead(address, data)) => self.buses.mmio.read(address, data),
                // Only level-triggered interrupts need it, and all pins here are edge-triggered.
                Ok(VcpuExit::IoapicEoi(_)) => {}
                Ok(VcpuExit::Shutdown) => return self.end(Exit::Crash("triple fault".to_owned())),
                Ok(VcpuExit::InternalError) => {
                    let reason = format!("KVM internal error: {}", self.describe());
                    return self.end(Exit::Crash(reason));
                }
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    let reason = format!("KVM cannot enter the guest: {reason:#x} on CPU {cpu}");
                    return self.end(Exit::Crash(reason));
                }
                Ok(other) => {
                    let reason = format!("unexpected exit from the guest: {other:?}");
                    return self.end(Exit::Crash(reason));
                }
                Err(error) if error.errno() == libc::EINTR => {
                    let control = self.shared.lock();
                    if control.wanted != Mode::Running {
                        return;
                    }
                    // This is done under the lock: a request to park that follows sets the flag
                    // again.
                    self.fd.set_kvm_immediate_exit(0);
                }
                // KVM returns EAGAIN for a CPU that the guest has not started yet.
                Err(error) if error.errno() == libc::EAGAIN => {}
                // A host on which many VMs start at once may lack memory for KVM for a moment.
                Err(error) if error.errno() == libc::ENOMEM && shortage.is_worth_waiting() => {
                    if !self.shared.stays_running_for(shortage::PAUSE) {
                        return;
                    }
                }
                Err(error) => {
                    let reason = format!("KVM cannot run the guest: {error}");
                    return self.end(Exit::Crash(reason));
                }
            }
        }
    }

    fn end(&self, exit: Exit) {
        self.shared.exit.send(exit);
        let mut control = self.shared.lock();
        if control.wanted == Mode::Running {
            control.wanted = Mode::Parked;
        }
    }

    /// The guest's position, for an error message.
    fn describe(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: KVM has just filled this member of the union, as the exit reason says.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        format!("suberror {suberror} at rip {rip:#x}")
    }
}
