//! Restores the packet filter's rules when another program removes them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::HostNet;
use super::ruleset::Announcements;

/// The pause after a repair, so that two programs that undo each other's work do not occupy a CPU.
const REST: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// The pause after a failed repair.
const RETRY: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// A thread that waits for the kernel to announce a change of the packet filter, and restores the
/// rules that were removed. The thread ends when this is dropped.
#[derive(Debug)]
pub struct Watch {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(super) fn start(host: HostNet) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = stop.try_clone()?;
        // The subscription comes before the first check, so that no change between the two is
        // missed.
        let announcements = Announcements::subscribe()?;
        let thread = thread::Builder::new()
            .name("network watch".to_owned())
            .spawn(move || run(&host, &announcements, &stopped))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The counter of an eventfd that is written once cannot overflow.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(host: &HostNet, announcements: &Announcements, stop: &OwnedFd) {
    let mut again = true;
    while again {
        let failed = match host.repair() {
            Ok(repaired) => {
                if repaired {
                    tracing::warn!(
                        "another program removed the packet filter's rules of guests; they were made again"
                    );
                }
                false
            }
            Err(error) => {
                tracing::error!(%error, "guests are cut off: their packet filter's rules are missing");
                true
            }
        };
        let limit = failed.then_some(&RETRY);
        again = rest(stop) && wait(announcements, stop, limit);
        announcements.drain();
    }
}

/// Pauses; returns false when the thread must end.
fn rest(stop: &OwnedFd) -> bool {
    let mut stopped = [PollFd::new(stop, PollFlags::IN)];
    let polled = rustix::io::retry_on_intr(|| poll(&mut stopped, Some(&REST)));
    polled == Ok(0)
}

/// Waits for an announcement, at most for `limit`; returns false when the thread must end.
fn wait(announcements: &Announcements, stop: &OwnedFd, limit: Option<&Timespec>) -> bool {
    let announced = announcements.as_fd();
    let mut both = [
        PollFd::new(stop, PollFlags::IN),
        PollFd::new(&announced, PollFlags::IN),
    ];
    let polled = rustix::io::retry_on_intr(|| poll(&mut both, limit));
    polled.is_ok() && both[0].revents().is_empty()
}
