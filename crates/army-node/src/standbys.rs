//! Standbys: a thread for each template that has any.
//!
//! A standby is a child of the thread that created it and ends with it, so the thread lives as long
//! as standbys of its template are kept. It sleeps until a standby is adopted.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use clone_host::launch::fork::Source;
use clone_host::launch::standby;
use clone_host::runtime::Runtime;
use clone_template::Template;

use crate::lock;

/// The longest time that a thread sleeps, and the pause after a failure.
const ROUND: Duration = Duration::from_secs(10);

/// The threads, by the names of their templates.
pub(crate) struct Standbys {
    runtime: Runtime,
    keepers: Mutex<HashMap<String, Keeper>>,
}

struct Keeper {
    /// Writing to the pipe wakes the thread, and closing it ends the thread.
    wake: File,
    wanted: Arc<AtomicU32>,
    ready: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Standbys {
    pub(crate) fn new(runtime: Runtime) -> Self {
        Self {
            runtime,
            keepers: Mutex::default(),
        }
    }

    /// Keeps `count` standbys of a template ready from now on.
    pub(crate) fn set(&self, name: &str, template: Template, count: u32) {
        if count == 0 {
            return self.stop(name);
        }
        let mut keepers = lock(&self.keepers);
        if let Some(keeper) = keepers.get_mut(name) {
            keeper.wanted.store(count, Ordering::Relaxed);
            // Where the pipe is full, the thread wakes anyway.
            let _ = std::io::Write::write(&mut keeper.wake, b".");
            return;
        }
        match self.start(name, template, count) {
            Ok(keeper) => {
                keepers.insert(name.to_owned(), keeper);
            }
            Err(error) => tracing::error!(template = name, %error, "cannot start to keep standbys"),
        }
    }

    /// Ends the standbys of a template, and returns when they have ended.
    pub(crate) fn stop(&self, name: &str) {
        let keeper = lock(&self.keepers).remove(name);
        if let Some(keeper) = keeper {
            keeper.end();
        }
    }

    /// The number of standbys that are ready, by the template's name.
    pub(crate) fn ready(&self) -> HashMap<String, u32> {
        let keepers = lock(&self.keepers);
        keepers
            .iter()
            .map(|(name, keeper)| (name.clone(), keeper.ready.load(Ordering::Relaxed)))
            .collect()
    }

    /// The number of standbys that are kept, by the template's name.
    pub(crate) fn wanted(&self) -> HashMap<String, u32> {
        let keepers = lock(&self.keepers);
        let wanted = keepers.iter();
        wanted
            .map(|(name, keeper)| (name.clone(), keeper.wanted.load(Ordering::Relaxed)))
            .collect()
    }

    fn start(&self, name: &str, template: Template, count: u32) -> std::io::Result<Keeper> {
        let (read, write) = rustix::pipe::pipe_with(
            rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK,
        )?;
        let wanted = Arc::new(AtomicU32::new(count));
        let ready = Arc::new(AtomicU32::new(0));
        let work = Work {
            name: name.to_owned(),
            runtime: self.runtime.clone(),
            template,
            wanted: Arc::clone(&wanted),
            ready: Arc::clone(&ready),
            wake: read,
        };
        let thread = std::thread::Builder::new()
            .name("standbys".into())
            .spawn(move || work.run())?;
        Ok(Keeper {
            wake: File::from(write),
            wanted,
            ready,
            thread: Some(thread),
        })
    }
}

impl Drop for Standbys {
    fn drop(&mut self) {
        for (_, keeper) in lock(&self.keepers).drain() {
            keeper.end();
        }
    }
}

impl Keeper {
    fn end(mut self) {
        self.wanted.store(0, Ordering::Relaxed);
        let thread = self.thread.take();
        drop(self);
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("a thread that keeps standbys panicked");
        }
    }
}

/// The state of a thread.
struct Work {
    name: String,
    runtime: Runtime,
    template: Template,
    wanted: Arc<AtomicU32>,
    ready: Arc<AtomicU32>,
    wake: OwnedFd,
}

impl Work {
    fn run(self) {
        while self.wanted.load(Ordering::Relaxed) > 0 {
            if let Err(error) = self.serve() {
                tracing::error!(template = self.name, %error, "cannot keep standbys");
                self.ready.store(0, Ordering::Relaxed);
                let timeout = rustix::event::Timespec::try_from(ROUND).ok();
                let poll = rustix::event::PollFd::new(&self.wake, rustix::event::PollFlags::IN);
                let _ = rustix::event::poll(&mut [poll], timeout.as_ref());
                self.drain();
            }
        }
    }

    fn serve(&self) -> clone_start::Result<()> {
        // The first clone records which pages the others should have mapped in advance.
        standby::train(&self.runtime, &self.template)?;
        let template = Template::open(self.template.dir())?;
        let id = template.manifest().id.clone();
        let source = Source::template(&template, &self.runtime)?;
        let mut standbys = standby::Standbys::new(&self.runtime, source, id)?;
        loop {
            let wanted = self.wanted.load(Ordering::Relaxed);
            if wanted == 0 {
                return Ok(());
            }
            let level = standbys.fill(wanted as usize)?;
            self.ready.store(level.ready as u32, Ordering::Relaxed);
            standbys.wait(&self.wake, ROUND)?;
            self.drain();
        }
    }

    fn drain(&self) {
        let mut bytes = [0; 64];
        while rustix::io::read(&self.wake, &mut bytes).is_ok_and(|count| count > 0) {}
    }
}
