//! The process of a VM.
//!
//! The launcher starts the program `clone-vm` ([`clone_start::invocation`]). The two are connected
//! by a Unix socket on standard input, over which the description and the taps are received
//! ([`clone_start::document`]), and by a pipe on standard output ([`clone_start::report`]). The
//! process does the following in this order: it closes every other descriptor ([`descriptors`]),
//! receives the description, starts a session of its own, opens every resource ([`open`]), jails
//! itself, assembles the machine ([`assemble`]), reports, and runs the event loop until the guest
//! ends ([`vm`]).
//!
//! With another first argument, the program only builds a jail and reports its status.
//!
//! All code that serves a hostile guest is in this crate and in `clone-vmm`; no command line,
//! network configuration or HTTP client is linked to it.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod assemble;
mod capture;
mod checkpointing;
mod checkpoints;
pub mod console;
pub mod control;
mod descriptors;
mod devices;
mod dirty_tracker;
mod disks;
mod jail;
mod log;
mod machine;
mod migrate;
mod nets;
pub mod open;
pub mod prefetch;
mod rate_limits;
mod reboot;
mod released;
mod rewind;
mod run_once;
mod snapshot;
mod threads;
mod timeline;
mod vm;

use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use clone_api::control::StartStage;
use clone_api::jail::JailStatus;
use clone_api::{ApiError, ErrorCode};
use clone_start::VmDir;
use clone_start::document::{self, Start};
use clone_start::error::Result;
use clone_start::invocation::{
    BUILD, CHECK_WORD, EXIT_CRASH, EXIT_INTERNAL, EXIT_KILLED, EXIT_POWER_OFF, EXIT_REBOOT,
    EXIT_START_FAILED, WORD,
};
use clone_start::{cpu, report};
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::Exit;
use rustix::process::Signal;

use jail::JailSpec;
use timeline::Timeline;

/// Runs a VM from its description on standard input to its end, if the program's arguments request
/// that.
pub fn main() -> Option<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    let word = words.next()?;
    let work = match word.to_str() {
        Some(WORD) => run,
        Some(CHECK_WORD) => check_jail,
        _ => return None,
    };
    let (build, dir) = (words.next()?, words.next()?);
    let closed = descriptors::close_inherited();
    log::start();
    if let Err(error) = closed {
        return Some(fail(ApiError::internal(&error)));
    }
    // The name that `ps` and the kernel's log show, since the path that it was started by may say
    // nothing.
    let _ = rustix::thread::set_name(c"clone-vm");
    Some(match build == BUILD {
        true => work(VmDir::at(dir.into())),
        false => fail(other_build()),
    })
}

/// Builds a jail, and reports how complete it is.
fn check_jail(dir: VmDir) -> ExitCode {
    let jail = jail::enter(&JailSpec {
        runtime_dir: dir.path().to_owned(),
        guest_memory_bytes: 0,
        vcpus: 1,
    });
    match jail.map(|status| report::ready(&status)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => fail(ApiError::internal(&error)),
        Err(error) => fail(ApiError::internal(&error)),
    }
}

fn other_build() -> ApiError {
    ApiError::new(
        ErrorCode::Internal,
        "`clone-vm` is of another build than the program that starts it",
    )
    .advise("install both of the same release, and restart servers that run since before")
}

fn run(dir: VmDir) -> ExitCode {
    // Until the report, the VM ends when its launcher does (as by Ctrl-C).
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let mut timeline = Timeline::default();
    timeline.reach(StartStage::Spawned);
    let (start, taps) = match document::receive(io::stdin()) {
        Ok(Some(received)) => received,
        // The launcher ended before it sent a description, so there is nobody to report to.
        Ok(None) => return ExitCode::from(EXIT_START_FAILED),
        Err(error) => return fail(error),
    };
    let mut events = match EventLoop::new() {
        Ok(events) => events,
        Err(error) => return fail(ApiError::internal(&error)),
    };
    timeline.reach(StartStage::Described);
    let (mut vm, jail) = match start_vm(&dir, start, taps, &mut events, timeline) {
        Ok(started) => started,
        Err(error) => return fail(error),
    };
    // A VM that waits for its name or its content still ends with its launcher.
    if !vm.waits() {
        let _ = rustix::process::set_parent_process_death_signal(None);
    }
    if let Err(error) = report::ready(&jail) {
        // The launcher has ended; the VM runs nevertheless.
        tracing::warn!(%error, "the launcher did not receive the report that the VM is ready");
    }
    let code = match vm.run(&mut events) {
        Ok(exit) => exit_code(&exit),
        Err(error) => {
            tracing::error!(%error, "the event loop failed");
            EXIT_INTERNAL
        }
    };
    ExitCode::from(code)
}

fn start_vm(
    dir: &VmDir,
    start: Start,
    taps: Vec<OwnedFd>,
    events: &mut EventLoop,
    mut timeline: Timeline,
) -> Result<(vm::Vm, JailStatus)> {
    descriptors::detach_stdin().map_err(|error| ApiError::internal(&error))?;
    // A session of its own keeps the launcher's terminal signals (Ctrl-C) away from the VM. The
    // call fails only for a group's leader, which a new process is only if its launcher made it
    // one.
    let _ = rustix::process::setsid();
    let extra: Vec<String> = kernel_arguments(&start);
    let required = start.required_jail.clone();
    let kvm = cpu::open_kvm()?;
    let (config, resources) = open::open(dir, start, taps)?;
    timeline.reach(StartStage::Opened);
    let disks = resources.devices.disks.iter();
    let memory_for_layers: u64 = disks.map(clone_disk::DiskFiles::memory_room).sum();
    let jail = jail::enter(&JailSpec {
        runtime_dir: dir.path().to_owned(),
        // The memory that a disk's layers use counts towards the same limit.
        guest_memory_bytes: config.memory.0 + memory_for_layers,
        vcpus: config.vcpus,
    })
    .map_err(|error| ApiError::internal(&error))?;
    required.check(&jail)?;
    timeline.reach(StartStage::Jailed);
    let described = (config, jail.clone());
    let mut vm = assemble::assemble(dir, described, &extra, kvm, resources, events, timeline)?;
    // Everything is built: from here on, every thread needs only the calls of its list.
    jail::confine_event_loop().map_err(|error| ApiError::internal(&error))?;
    vm.reach(StartStage::Ready);
    if !vm.waits() {
        vm.begin()?;
    }
    Ok((vm, jail))
}

/// The arguments that the kernel's command line needs besides those of the description.
fn kernel_arguments(start: &Start) -> Vec<String> {
    let nets = start.nets.iter();
    nets.filter_map(|net| net.kernel_argument.clone()).collect()
}

fn fail(error: ApiError) -> ExitCode {
    if report::failed(&error).is_err() {
        // Nobody reads the report, so the error goes to the log.
        tracing::error!(message = error.message, "the VM could not start");
    }
    ExitCode::from(EXIT_START_FAILED)
}

fn exit_code(exit: &Exit) -> u8 {
    match exit {
        Exit::PowerOff => EXIT_POWER_OFF,
        Exit::Reboot => EXIT_REBOOT,
        Exit::Killed => EXIT_KILLED,
        Exit::Crash(reason) => {
            tracing::error!(reason, "the guest crashed");
            EXIT_CRASH
        }
    }
}
