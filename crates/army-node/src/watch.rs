//! The processes of VMs, held by handles: the kernel tells when one ends, and one that runs costs
//! nothing. What follows from an end is for [`super::supervise`].

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Processes whose end is waited for, by the ids of their VMs.
#[derive(Default)]
pub(super) struct Watch {
    held: BTreeMap<String, OwnedFd>,
}

impl Watch {
    /// Whether the VM's process was running when it was last waited.
    pub(super) fn holds(&self, id: &str) -> bool {
        self.held.contains_key(id)
    }

    /// Takes up a handle of a VM's process (pidfd_open(2)).
    pub(super) fn hold(&mut self, id: &str, process: OwnedFd) {
        self.held.insert(id.to_owned(), process);
    }

    /// Waits until a process ends, or for so long. Those that have ended are held no more.
    pub(super) fn wait(&mut self, limit: Duration) {
        let handles = self.held.values();
        let mut handles: Vec<_> = handles.map(|it| PollFd::new(it, PollFlags::IN)).collect();
        let limit_of_poll = Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: limit.subsec_nanos().into(),
        };
        match poll(&mut handles, Some(&limit_of_poll)) {
            Ok(0) | Err(Errno::INTR) => return,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot wait for VMs to end");
                return std::thread::sleep(limit);
            }
        }
        let ended: Vec<bool> = handles.iter().map(|it| !it.revents().is_empty()).collect();
        let mut ended = ended.into_iter();
        // In the order of the handles, which is that of the map.
        self.held.retain(|_, _| ended.next() != Some(true));
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Instant;

    use clone::runtime::Process;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn an_end_is_told_at_once_and_of_the_one_that_ended() {
        let mut watch = Watch::default();
        let mut sleepers = ["a", "b", "c"].map(|id| {
            let child = Command::new("sleep").arg("600").spawn().unwrap();
            let handle = Process::of(child.id()).unwrap().open().unwrap().unwrap();
            watch.hold(id, handle);
            child
        });
        watch.wait(Duration::from_millis(5));
        assert!(["a", "b", "c"].iter().all(|id| watch.holds(id)));
        let start = Instant::now();
        sleepers[1].kill().unwrap();
        watch.wait(LONG);
        assert!(start.elapsed() < LONG);
        assert_eq!(
            ["a", "b", "c"].map(|id| watch.holds(id)),
            [true, false, true]
        );
        for sleeper in &mut sleepers {
            sleeper.kill().unwrap();
            sleeper.wait().unwrap();
        }
        while watch.holds("a") || watch.holds("c") {
            watch.wait(LONG);
        }
    }
}
