//! Takes the exit statuses of VMs' processes that this process started and leaves running, so that
//! none of them stays as a zombie for as long as a server lives.
//!
//! One thread waits for all of them, through a pidfd each.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use rustix::event::epoll;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The stack of the thread, which only waits.
const STACK_BYTES: usize = 64 << 10;

/// The children that are waited for.
struct Reaper {
    epoll: OwnedFd,
    /// By their process ids. Locked for a moment each, by those who add one and by the thread.
    children: Mutex<HashMap<u64, (OwnedFd, Child)>>,
}

/// Has the exit status of `child` taken when it ends.
pub(super) fn adopt(child: Child) {
    if let Err(error) = try_adopt(child) {
        // The VM runs as well without; what stays of it in the end is an entry of the process table.
        tracing::warn!(%error, "the end of a VM's process will not be waited for");
    }
}

fn try_adopt(child: Child) -> io::Result<()> {
    static REAPER: OnceLock<Reaper> = OnceLock::new();
    let reaper = match REAPER.get() {
        Some(reaper) => reaper,
        None => {
            let new = Reaper::new()?;
            // Where two are made at once, the thread starts for the one that stays.
            let mut made = false;
            let reaper = REAPER.get_or_init(|| {
                made = true;
                new
            });
            if made {
                thread::Builder::new()
                    .name("reaper".to_owned())
                    .stack_size(STACK_BYTES)
                    .spawn(|| reaper.run())?;
            }
            reaper
        }
    };
    reaper.add(child)
}

impl Reaper {
    fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            children: Mutex::default(),
        })
    }

    fn add(&self, child: Child) -> io::Result<()> {
        let key = u64::from(child.id());
        let pid = Pid::from_raw(child.id().cast_signed()).ok_or(rustix::io::Errno::SRCH)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let mut children = self.locked();
        let data = epoll::EventData::new_u64(key);
        epoll::add(&self.epoll, &pidfd, data, epoll::EventFlags::IN)?;
        children.insert(key, (pidfd, child));
        Ok(())
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(64);
        loop {
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "ends of VMs' processes are not waited for any more");
                    return;
                }
            }
            for event in &events {
                self.take(event.data.u64());
            }
        }
    }

    fn take(&self, key: u64) {
        let ended = self.locked().remove(&key);
        if let Some((_pidfd, mut child)) = ended {
            // It has ended, so this returns at once.
            let _ = child.wait();
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashMap<u64, (OwnedFd, Child)>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn children_that_end_leave_no_zombies() {
        let mut processes = Vec::new();
        for _ in 0..20 {
            let child = Command::new("true").spawn().unwrap();
            processes.push(PathBuf::from(format!("/proc/{}/stat", child.id())));
            adopt(child);
        }
        let begun = Instant::now();
        while processes.iter().any(|stat| stat.exists()) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{processes:?}");
            thread::yield_now();
        }
    }
}
