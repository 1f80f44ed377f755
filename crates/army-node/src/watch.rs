//! Waiting for the processes of VMs by their handles (pidfd_open(2)): the kernel tells when one
//! ends, and one that runs costs nothing. [`crate::supervise`] acts on what has ended.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Processes whose end is awaited, by the ids of their VMs.
#[derive(Default)]
pub(crate) struct Watch {
    processes: BTreeMap<String, OwnedFd>,
}

impl Watch {
    /// Whether the VM's process was running when [`Watch::wait`] last returned.
    pub(crate) fn contains(&self, id: &str) -> bool {
        self.processes.contains_key(id)
    }

    /// Adds the handle of a VM's process.
    pub(crate) fn add(&mut self, id: &str, process: OwnedFd) {
        self.processes.insert(id.to_owned(), process);
    }

    /// Waits until a process ends, and for `limit` at the most. Processes that have ended are
    /// removed.
    pub(crate) fn wait(&mut self, limit: Duration) {
        let handles = self.processes.values();
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
        // The handles are in the order of the map.
        self.processes.retain(|_, _| ended.next() != Some(true));
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Instant;

    use clone_start::Process;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_end_of_a_process_is_noticed_at_once() {
        let mut watch = Watch::default();
        let mut sleepers = ["a", "b", "c"].map(|id| {
            let child = Command::new("sleep").arg("600").spawn().unwrap();
            let handle = Process::of(child.id()).unwrap().open().unwrap().unwrap();
            watch.add(id, handle);
            child
        });
        watch.wait(Duration::from_millis(5));
        assert!(["a", "b", "c"].iter().all(|id| watch.contains(id)));
        let start = Instant::now();
        sleepers[1].kill().unwrap();
        watch.wait(LONG);
        assert!(start.elapsed() < LONG);
        assert_eq!(
            ["a", "b", "c"].map(|id| watch.contains(id)),
            [true, false, true]
        );
        for sleeper in &mut sleepers {
            sleeper.kill().unwrap();
            sleeper.wait().unwrap();
        }
        while watch.contains("a") || watch.contains("c") {
            watch.wait(LONG);
        }
    }
}
