//! Process 1 of a minimal image: sets up the machine ([`furnish`]), starts the agent as a child,
//! reaps orphans, and ends the machine. SIGTERM and SIGUSR2 power it off and SIGINT reboots it,
//! after all processes were asked to end.
//!
//! The agent is a child so that its waiting for commands does not interfere with the reaping of
//! orphans. If it dies, it is started again.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::furnish;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, setsid, wait};
use rustix::system::{RebootCommand, reboot};

/// A program of the image that is run once before the agent.
const START_SCRIPT: &str = "/etc/clone/rc";
/// An agent that dies within this time is started again only after a pause.
const SETTLED: Duration = Duration::from_secs(5);

/// The signal that powers the machine off, besides SIGTERM, as in BusyBox's init.
pub(crate) const POWER_OFF: i32 = libc::SIGUSR2;
/// The signal that reboots the machine; the kernel sends it at Ctrl-Alt-Delete.
pub(crate) const REBOOT: i32 = libc::SIGINT;
/// The time limit for processes to end with the machine.
const END_GRACE: Duration = Duration::from_secs(10);

/// Whether process 1 is this program.
pub(crate) fn is_ours() -> bool {
    let program = |pid: &str| fs::read_link(format!("/proc/{pid}/exe"));
    matches!((program("1"), program("self")), (Ok(first), Ok(own)) if first == own)
}

/// Runs as init until the machine ends.
pub(crate) fn main(agent: impl Fn() -> ExitCode) -> ExitCode {
    furnish::furnish();
    if std::env::var_os("PATH").is_none() {
        // SAFETY: there is one thread yet.
        unsafe { std::env::set_var("PATH", crate::exec::DEFAULT_PATH) };
    }
    // Not leading a session already is all that could stand against it.
    let _ = setsid();
    crate::interfaces::bring_loopback_up();
    if fs::metadata(START_SCRIPT).is_ok()
        && let Err(error) = std::process::Command::new(START_SCRIPT).status()
    {
        crate::say(&format!("cannot run {START_SCRIPT}: {error}"));
    }
    block_signals();
    let queue = match signal_queue() {
        Ok(queue) => queue,
        Err(error) => {
            crate::say(&format!("cannot wait for signals: {error}"));
            return ExitCode::FAILURE;
        }
    };
    loop {
        let started = Instant::now();
        // SAFETY: there is one thread, so the child may do anything.
        match unsafe { libc::fork() } {
            0 => {
                unblock_signals();
                return agent();
            }
            child => {
                if let Some(end) = watch(&queue, child) {
                    end_processes(&queue);
                    return power_down(end);
                }
            }
        }
        if started.elapsed() < SETTLED {
            thread::sleep(Duration::from_secs(1));
        }
        crate::say("the agent ended; starting it again");
    }
}

/// Reaps children until `child` is among them (`None`), or a signal asks for the machine's end.
fn watch(queue: &File, child: i32) -> Option<RebootCommand> {
    loop {
        match wait_signal(queue, None) {
            Some(libc::SIGTERM | POWER_OFF) => return Some(RebootCommand::PowerOff),
            Some(REBOOT) => return Some(RebootCommand::Restart),
            _ => {}
        }
        // One signal may stand for many children.
        while let Ok(Some((pid, _))) = wait(WaitOptions::NOHANG) {
            if Some(pid) == Pid::from_raw(child) {
                return None;
            }
        }
    }
}

/// Asks all processes to end, waits for them, and kills the rest.
fn end_processes(queue: &File) {
    let deadline = Instant::now() + END_GRACE;
    signal_all(libc::SIGTERM);
    // Every process that is left is a child of process 1, or descends from one. All that ended are
    // reaped before waiting: one signal may stand for many.
    while Instant::now() < deadline {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => {
                wait_signal(queue, Some(deadline));
            }
            Err(_) => break,
        }
    }
    signal_all(libc::SIGKILL);
}

/// Returns only if the kernel refuses.
fn power_down(end: RebootCommand) -> ExitCode {
    rustix::fs::sync();
    if let Err(error) = reboot(end) {
        crate::say(&format!("cannot end the machine: {error}"));
    }
    ExitCode::FAILURE
}

fn signal_all(signal: i32) {
    // SAFETY: plain system call; it leaves out the caller and fails only where nobody else is.
    unsafe { libc::kill(-1, signal) };
}

fn signal_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: the call fills the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it was just filled.
    let mut set = unsafe { set.assume_init() };
    for signal in [libc::SIGCHLD, libc::SIGTERM, POWER_OFF, REBOOT] {
        // SAFETY: a live set and a signal that exists.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

/// Blocks these signals, so that they are read from a [`signal_queue`].
fn block_signals() {
    let set = signal_set();
    // SAFETY: a live set; the old one is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

fn unblock_signals() {
    let set = signal_set();
    // SAFETY: a live set; the old one is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
}

/// A descriptor from which blocked signals are read.
fn signal_queue() -> io::Result<File> {
    let set = signal_set();
    // SAFETY: a live set.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Waits for a signal; `None` at the deadline, or after an interruption.
fn wait_signal(mut queue: &File, deadline: Option<Instant>) -> Option<i32> {
    let left = deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        }
    });
    poll(&mut [PollFd::new(&queue, PollFlags::IN)], left.as_ref()).ok()?;
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    queue.read_exact(&mut info).ok()?;
    // The signal's number is the first member.
    info.first_chunk().map(|number| i32::from_ne_bytes(*number))
}
