//! Keeps standbys of a template ready.

use std::time::Duration;

use agent_proto::client::{ByteLimit, Connection, Deadline};
use agent_proto::messages::Exec;
use clone_api::control::TouchedPages;
use clone_api::{ApiError, Client};
use clone_start::Process;
use clone_start::VmDir;
use clone_start::error::{Result, failed};
use clone_template::Template;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;

use super::fork::{self, Overrides, Source, start_standby};
use crate::runtime::{RunningVm, Runtime};

/// The time limit for a clone to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// The output limit of the command that the clone runs, which prints nothing.
const ANSWER_BYTES: ByteLimit = ByteLimit::new(64 << 10);

/// The status of a set of standbys.
#[derive(Debug, Clone, Copy)]
pub struct Level {
    /// The number of standbys that are ready.
    pub ready: usize,
}

/// Records which pages a template's clones touch first, unless that is recorded: makes a clone, has
/// it do what every clone does first (take its identity, answer an exec), reads the touched pages,
/// and ends it. All later clones have these pages prefetched.
///
/// # Errors
/// The clone failed, so all others would fail as well.
pub fn train(runtime: &Runtime, template: &Template) -> Result<()> {
    if template.prefetch()?.is_some() || template.content().agent_version.is_none() {
        return Ok(());
    }
    let source = Source::template(template, runtime)?.observed();
    let names = fork::names(None, "first", 1)?;
    let forked = fork::fork(runtime, &source, &names, &Overrides::default(), true);
    forked.into_iter().next().transpose()?;
    let vm = runtime.find(&names[0])?;
    let touched = first_moments(&vm);
    fork::end(runtime, &vm);
    let text = serde_json::to_vec(&touched?).map_err(|error| ApiError::internal(&error))?;
    template.write_prefetch(&text)
}

/// The pages that a clone has touched after its first answer.
fn first_moments(vm: &RunningVm) -> Result<TouchedPages> {
    let deadline = Deadline::after(ANSWER_LIMIT);
    Connection::open(&vm.dir.vsock_socket(), deadline)
        .and_then(|connection| {
            connection.exec(Exec {
                command: vec!["true".to_owned()],
                ..Exec::default()
            })
        })
        .and_then(|running| running.collect(ANSWER_BYTES))
        .map_err(|error| ApiError::internal(&error))?;
    let touched = Client::new(vm.dir.control_socket()).touched_pages();
    touched.map_err(|error| ApiError::internal(&error))
}

/// The standbys of one template that this process started. They end with it.
pub struct Standbys<'a> {
    runtime: &'a Runtime,
    source: Source,
    template_id: String,
    made: Vec<(VmDir, Process)>,
    watch: std::os::fd::OwnedFd,
}

impl<'a> Standbys<'a> {
    /// Makes an empty set of standbys of `source`, the template with this id.
    pub fn new(runtime: &'a Runtime, source: Source, template_id: String) -> Result<Self> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .map_err(|error| ApiError::internal(&std::io::Error::from(error)))?;
        let vms = runtime.vms_dir();
        // An adoption renames the directory; the end of a standby is noticed when its directory is
        // removed.
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

    /// Starts as many standbys as are missing to `count`.
    pub fn fill(&mut self, count: usize) -> Result<Level> {
        loop {
            self.made
                .retain(|(dir, process)| dir.path().exists() && process.is_alive());
            let ready = self.runtime.standbys(&self.template_id)?.len();
            if ready >= count {
                return Ok(Level { ready });
            }
            self.made.push(start_standby(self.runtime, &self.source)?);
        }
    }

    /// Waits until a standby may have been adopted, or `also` is readable (then returns true), or
    /// `limit` has passed.
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
            // An adopted standby has another directory, and no longer belongs to this set.
            if dir.path().exists() {
                let _ = process.signal(rustix::process::Signal::KILL);
                let _ = process.wait(Some(Duration::from_secs(5)));
                if let Err(error) = self.runtime.sweep_one(dir) {
                    tracing::warn!(message = error.message, "a standby is left");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Instant;

    use agent_proto::frame::encode;
    use agent_proto::messages::{FromAgent, Output, Started, from_agent};

    use super::super::testing::FakeVm;
    use super::*;

    fn encoded(kind: from_agent::Kind) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn an_agent_that_floods_ends_the_training_and_nothing_else() {
        let started = encoded(from_agent::Kind::Started(Started {
            id: 1,
            pid: 1,
            ..Started::default()
        }));
        let vm = FakeVm::new(started, |stream| {
            let data = vec![0; 32 << 10];
            let output = from_agent::Kind::Output(Output {
                data,
                ..Output::default()
            });
            stream.write_all(&encoded(output))
        });
        let begun = Instant::now();
        let failed = first_moments(&vm.running()).unwrap_err();
        assert!(failed.message.contains("65536 bytes"), "{}", failed.message);
        assert!(begun.elapsed() < ANSWER_LIMIT);
    }
}
