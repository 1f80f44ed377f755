//! Process 1 of a minimal image: mounts what every program expects, starts the agent proper as a
//! child, and reaps orphans.
//!
//! The agent is a child so that its own waiting for commands is not mixed with the reaping of
//! strangers. When it dies it is started again.

use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{fs, thread};

use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, WaitOptions, setsid, wait};

/// What is mounted where, by the kinds and options that a distribution's init would use.
const MOUNTS: &[(&str, &str, &str)] = &[
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", "mode=0755"),
    ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("tmpfs", "/run", "mode=0755"),
    ("tmpfs", "/tmp", "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", ""),
];
/// A program of the image that is run once before the agent.
const START_SCRIPT: &str = "/etc/clone/rc";
/// An agent that dies sooner than this is started again only after a pause.
const SETTLED: Duration = Duration::from_secs(5);

/// Is init for the rest of the machine's life.
pub(crate) fn main(agent: impl Fn() -> ExitCode) -> ExitCode {
    mount_all();
    if std::env::var_os("PATH").is_none() {
        // SAFETY: there is one thread yet.
        unsafe { std::env::set_var("PATH", crate::exec::DEFAULT_PATH) };
    }
    // Not leading a session already is all that could stand against it.
    let _ = setsid();
    crate::identity::bring_loopback_up();
    if fs::metadata(START_SCRIPT).is_ok()
        && let Err(error) = std::process::Command::new(START_SCRIPT).status()
    {
        crate::say(&format!("cannot run {START_SCRIPT}: {error}"));
    }
    loop {
        let started = Instant::now();
        // SAFETY: there is one thread, so the child may do anything.
        match unsafe { libc::fork() } {
            0 => return agent(),
            child => reap_until(child),
        }
        if started.elapsed() < SETTLED {
            thread::sleep(Duration::from_secs(1));
        }
        crate::say("the agent ended; starting it again");
    }
}

/// Waits for all children until `child` is among them.
fn reap_until(child: i32) {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if Some(pid) == Pid::from_raw(child) => return,
            Err(rustix::io::Errno::CHILD) => return,
            _ => {}
        }
    }
}

fn mount_all() {
    for (kind, path, options) in MOUNTS {
        let _ = fs::create_dir_all(path);
        let flags = MountFlags::NOSUID;
        let options = std::ffi::CString::new(*options).unwrap_or_default();
        match mount(*kind, *path, *kind, flags, options.as_c_str()) {
            // The kernel or an earlier stage has mounted it.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => crate::say(&format!("cannot mount {path}: {error}")),
        }
    }
}
