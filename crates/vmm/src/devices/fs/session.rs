//! The requests that the server and the workers have, and the files that are open for them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use clone_fuse::link::Kind;
use rustix::io::Errno;

use super::backend::Backend;
use super::in_flight::{Files, Pending, Work};
use super::queue::{FileRequest, SharedFile};
use super::worker::{Job, Workers};
use super::{ANSWER_LIMIT, DEVICE, FsHandle};
use crate::timer::Timer;
use crate::virtio::DeviceError;

/// What the device knows of its requests.
pub(super) struct Session {
    /// The server; `None` after it was given up.
    pub(super) backend: Option<Backend>,
    pub(super) workers: Workers,
    pub(super) timer: Timer,
    pub(super) pending: HashMap<u64, Pending>,
    pub(super) files: Files,
    pub(super) next_tag: u64,
    /// Whether a request waits until there are fewer.
    pub(super) held_back: bool,
    pub(super) handle: FsHandle,
}

impl Session {
    pub(super) fn new(socket: OwnedFd) -> Result<Self, DeviceError> {
        Ok(Self {
            backend: Some(Backend::new(socket)),
            workers: Workers::new().map_err(DEVICE.host_error("make an eventfd"))?,
            timer: Timer::new().map_err(DEVICE.host_error("make a timer"))?,
            pending: HashMap::new(),
            files: Files::default(),
            next_tag: 0,
            held_back: false,
            handle: FsHandle::default(),
        })
    }

    pub(super) fn new_tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    /// Since when the oldest request waits for the server.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let waiting = self.pending.values();
        let waiting = waiting.filter_map(|it| it.work.waits_since());
        let blocked = self.backend.as_ref().and_then(Backend::blocked_since);
        waiting.chain(blocked).min()
    }

    /// Whether a request waits for the server's answer.
    pub(super) fn has_asked(&self) -> bool {
        let mut pending = self.pending.values();
        pending.any(|it| it.work.waits_since().is_some())
    }

    /// Sets the time limit for the server, where nothing waits for it yet.
    pub(super) fn arm_first(&self) -> Result<(), DeviceError> {
        let is_blocked = |it: &Backend| it.blocked_since().is_some();
        match self.has_asked() || self.backend.as_ref().is_some_and(is_blocked) {
            true => Ok(()),
            false => self.arm(ANSWER_LIMIT),
        }
    }

    pub(super) fn arm(&self, delay: Duration) -> Result<(), DeviceError> {
        let armed = self.timer.arm_once(delay);
        armed.map_err(DEVICE.host_error("arm a timer"))
    }

    /// Starts a request on files, or asks the server for the file that is missing. Returns a request
    /// that cannot be carried out, with the error.
    pub(super) fn advance(&mut self, tag: u64, mut pending: Pending) -> Option<(Pending, Errno)> {
        let Work::File {
            request,
            data,
            file,
            ..
        } = &mut pending.work
        else {
            return Some((pending, Errno::IO));
        };
        let FileRequest {
            handle,
            other,
            action,
        } = *request;
        if file.is_none() {
            *file = self.files.get(handle);
        }
        let second: Option<Option<SharedFile>> = other.map(|other| self.files.get(other));
        let missing = match (&*file, &second) {
            (None, _) => Some(handle),
            (Some(_), Some(None)) => other,
            (Some(_), _) => None,
        };
        if let Some(missing) = missing {
            let Some(backend) = &mut self.backend else {
                return Some((pending, Errno::IO));
            };
            backend.push(tag, Kind::Descriptor, missing.to_le_bytes().to_vec());
            if self.arm_first().is_err() {
                return Some((pending, Errno::IO));
            }
            self.pending.insert(tag, pending);
            return None;
        }
        let Some(file) = file.take() else {
            return Some((pending, Errno::IO));
        };
        let job = Job {
            tag,
            file,
            other: second.flatten(),
            action,
            data: std::mem::take(data),
        };
        pending.work = Work::Worker;
        if self.workers.submit(job).is_err() {
            return Some((pending, Errno::NOMEM));
        }
        self.pending.insert(tag, pending);
        None
    }
}
