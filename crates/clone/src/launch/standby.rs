//! Keeping standbys of a template ready.

use std::time::Duration;

use clone_api::ApiError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;

use super::fork::{Source, start_standby};
use crate::error::{Result, failed};
use crate::runtime::{Process, Runtime, VmDir};

/// What a server of standbys tells as it goes.
#[derive(Debug, Clone, Copy)]
pub struct Level {
    /// How many are ready.
    pub ready: usize,
}

/// Standbys of one template, made by this process. They end with it.
pub struct Standbys<'a> {
    runtime: &'a Runtime,
    source: Source,
    template_id: String,
    made: Vec<(VmDir, Process)>,
    watch: std::os::fd::OwnedFd,
}

impl<'a> Standbys<'a> {
    /// Of `source`, the template of this id; none yet.
    pub fn new(runtime: &'a Runtime, source: Source, template_id: String) -> Result<Self> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .map_err(|error| ApiError::internal(&std::io::Error::from(error)))?;
        let vms = runtime.vms_dir();
        // An adoption is a rename; an end is seen when the directory is swept.
        let events = inotify::WatchFlags::MOVED_FROM | inotify::WatchFlags::DELETE;
        inotify::add_watch(&watch, vms, events)
            .map_err(|error| failed("watch", vms)(error.into()))?;
        Ok(Self {
            runtime,
            source,
            template_id,
            made: Vec::new(),
            watch,
        })
    }

    /// Makes as many as are missing to `count`.
    pub fn fill(&mut self, count: usize) -> Result<Level> {
        loop {
            self.made.retain(|(dir, process)| {
                let here = dir.path().exists() && process.is_alive();
                if !process.is_alive() {
                    reap(*process);
                }
                here
            });
            let ready = self.runtime.standbys(&self.template_id)?.len();
            if ready >= count {
                return Ok(Level { ready });
            }
            self.made.push(start_standby(self.runtime, &self.source)?);
        }
    }

    /// Waits until one may have been taken, or `also` is readable (true then), or `limit` is over.
    pub fn wait(&self, also: &impl std::os::fd::AsFd, limit: Duration) -> Result<bool> {
        let timeout = rustix::event::Timespec::try_from(limit)
            .map_err(|error| ApiError::internal(&std::io::Error::other(error)))?;
        let mut fds = [
            PollFd::new(&self.watch, PollFlags::IN),
            PollFd::new(also, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(ApiError::internal(&std::io::Error::from(error))),
        }
        let ended = !fds[1].revents().is_empty();
        let mut events = [0; 4096];
        while rustix::io::read(&self.watch, &mut events).is_ok_and(|count| count > 0) {}
        Ok(ended)
    }
}

impl Drop for Standbys<'_> {
    fn drop(&mut self) {
        for (dir, process) in &self.made {
            // One that was adopted has another directory, and is not ours any more.
            if dir.path().exists() {
                let _ = process.signal(rustix::process::Signal::KILL);
                let _ = process.wait(Some(Duration::from_secs(5)));
                reap(*process);
                if let Err(error) = self.runtime.sweep_one(dir) {
                    tracing::warn!(message = error.message, "a standby is left");
                }
            }
        }
    }
}

/// Takes a child's exit status, so that it does not stay as a zombie.
fn reap(process: Process) {
    if let Some(pid) = rustix::process::Pid::from_raw(process.pid as i32) {
        // Not a child of ours, or not ended: nothing to take.
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
    }
}
