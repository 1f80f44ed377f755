//! The virtio-fs device: a directory of the host that the guest mounts by its tag.
//!
//! The directory is another process's, the server of the share: names and attributes are asked of it
//! over a socket (`backend`). What the guest reads from regular files and writes to them moves
//! between the file and the guest's RAM in this process, by descriptors that the server has opened
//! (`worker`); neither side shares the guest's memory. A server that does not answer in time or says
//! what makes no sense is given up: requests fail with `EIO` from then on, and the VM goes on.
//!
//! Source: VIRTIO 1.3, 5.11; Linux, include/uapi/linux/fuse.h.

mod backend;
mod in_flight;
mod queue;
mod session;
mod state;
mod submission;
#[cfg(test)]
mod tests;
mod worker;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clone_fuse::link::Kind;
use clone_fuse::wire::{OUT_HEADER, out_header};
use rustix::event::PollFlags;
use rustix::io::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;

use crate::virtio::budget::Budget;
use crate::virtio::{
    Activation, DeviceError, DeviceName, RequestQueues, Stopped, Turn, VirtioDevice,
};
use backend::Received;
use in_flight::{Pending, Work};
use session::Session;
pub use state::{FsState, MAX_TAG, SavedFs};
use submission::Submission;
use worker::{Done, Outcome};

/// The name that errors give the device.
const DEVICE: DeviceName = DeviceName::new("fs");
/// The sizes of the queue for requests to forget, and of the request queue. A request of the largest
/// size has 256 pages and a few headers.
const QUEUE_SIZES: [u16; 2] = [64, 512];
/// The work of one call.
const BUDGET: Budget = Budget::new(256, 16 << 20);
/// The longest time that a request waits for the server.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// The longest time that a pause waits for the server.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

const TOKEN_SERVER: u32 = 0;
const TOKEN_WORKERS: u32 = 1;
const TOKEN_TIMER: u32 = 2;

/// Why a share is not served any more; shared with those who tell people.
#[derive(Clone, Debug, Default)]
pub struct FsHandle(Arc<Mutex<Option<String>>>);

impl FsHandle {
    /// Why the share is not served any more; `None` while it is.
    pub fn failure(&self) -> Option<String> {
        // The lock is held for moments only.
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, failure: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }
}

/// A virtio-fs device.
pub struct Fs {
    tag: String,
    config: [u8; state::CONFIG_BYTES],
    session: Session,
    active: Option<RequestQueues>,
}

impl Fs {
    /// A new device for the share that the server at the other end of `socket` serves.
    ///
    /// # Errors
    /// [`DeviceError::State`] for an impossible tag, [`DeviceError::Host`] where there is no timer.
    pub fn new(tag: &str, socket: OwnedFd) -> Result<Self, DeviceError> {
        state::check_tag(tag)?;
        Ok(Self {
            tag: tag.to_owned(),
            config: state::config_space(tag),
            session: Session::new(socket)?,
            active: None,
        })
    }

    /// A handle that tells whether the share is served.
    pub fn handle(&self) -> FsHandle {
        self.session.handle.clone()
    }

    fn descriptors(&self) -> Vec<(u32, RawFd)> {
        let session = &self.session;
        let server = session.backend.as_ref();
        let server = server.map(|it| (TOKEN_SERVER, it.as_raw_fd()));
        let own = [
            (TOKEN_WORKERS, session.workers.as_raw_fd()),
            (TOKEN_TIMER, session.timer.as_raw_fd()),
        ];
        server.into_iter().chain(own).collect()
    }

    fn register(&self) -> Result<(), DeviceError> {
        match &self.active {
            Some(active) => active.register(&self.descriptors(), "wait for the server"),
            None => Ok(()),
        }
    }

    fn unregister(&self) {
        if let Some(active) = &self.active {
            active.unregister(&self.descriptors());
        }
    }

    /// Takes the requests of the queue `slot`.
    fn serve(&mut self, slot: usize) -> Result<(), DeviceError> {
        let mut budget = BUDGET;
        loop {
            let Some(active) = &mut self.active else {
                return Ok(());
            };
            let mut turn = Turn::new(&mut budget);
            let mut submission = Submission {
                slot,
                session: &mut self.session,
            };
            let stopped = active.queues[slot].take(&active.ram, &mut turn, &mut submission)?;
            if stopped == Stopped::Blocked {
                self.session.held_back = true;
            }
            let again = active.queues[slot].settle(&active.ram, stopped, &mut budget)?;
            self.flush()?;
            if !again {
                return self.signal();
            }
        }
    }

    /// Sends what waits, and asks to be told when more can be sent.
    fn flush(&mut self) -> Result<(), DeviceError> {
        let Some(backend) = &mut self.session.backend else {
            return Ok(());
        };
        let was_blocked = backend.blocked_since().is_some();
        let flushed = backend.flush();
        let is_blocked = backend.blocked_since().is_some();
        if let Err(error) = flushed {
            return self.give_up(&format!("the server has gone: {error}"));
        }
        let (Some(active), Some(backend)) = (&self.active, &self.session.backend) else {
            return Ok(());
        };
        let mut interest = EventSet::IN;
        interest.set(EventSet::OUT, is_blocked);
        // It is not registered while the device is paused.
        let _ = active.events.modify(backend, TOKEN_SERVER, interest);
        match is_blocked && !was_blocked {
            true => self.session.arm(ANSWER_LIMIT),
            false => Ok(()),
        }
    }

    /// Answers what the server has answered.
    fn receive(&mut self) -> Result<(), DeviceError> {
        while let Some(backend) = &mut self.session.backend {
            match backend.receive() {
                Ok(Some(received)) => self.received(received)?,
                Ok(None) => return Ok(()),
                Err(error) => return self.give_up(&format!("the server has failed: {error}")),
            }
        }
        Ok(())
    }

    fn received(&mut self, received: Received) -> Result<(), DeviceError> {
        let Some(pending) = self.session.pending.remove(&received.tag) else {
            // The device was reset meanwhile.
            return Ok(());
        };
        match pending.work {
            Work::Server { opens, .. } => {
                let handle = opens.and_then(|at| received.content.get(at..at + 8));
                let handle = handle.and_then(|bytes| bytes.try_into().ok());
                if let (Some(handle), Some(file)) = (handle, received.file) {
                    let handle = u64::from_le_bytes(handle);
                    self.session.files.insert(handle, Arc::new(file));
                }
                self.answer(&pending, received.error, &received.content)
            }
            Work::File {
                ref request,
                ref file,
                ..
            } => {
                let (error, Some(arrived)) = (received.error, received.file) else {
                    let error = received.error.unwrap_or(Errno::BADF);
                    return self.answer(&pending, Some(error), &[]);
                };
                if error.is_some() {
                    return self.answer(&pending, error, &[]);
                }
                let handle = match (file, request.other) {
                    (Some(_), Some(other)) => other,
                    _ => request.handle,
                };
                self.session.files.insert(handle, Arc::new(arrived));
                self.resume_request(received.tag, pending)
            }
            // The server answers what it was not asked.
            Work::Worker => {
                self.session.pending.insert(received.tag, pending);
                self.give_up("the server broke the protocol")
            }
        }
    }

    /// Goes on with a request on files, of which one more is open.
    fn resume_request(&mut self, tag: u64, pending: Pending) -> Result<(), DeviceError> {
        if let Some((pending, error)) = self.session.advance(tag, pending) {
            self.answer(&pending, Some(error), &[])?;
        }
        Ok(())
    }

    /// Answers what the workers have done.
    fn finish(&mut self) -> Result<(), DeviceError> {
        for Done { tag, result } in self.session.workers.take_done() {
            let Some(pending) = self.session.pending.remove(&tag) else {
                continue;
            };
            match result {
                Ok(Outcome::Filled(count)) => self.put(&pending, None, &[], count)?,
                Ok(Outcome::Body(body)) => self.put(&pending, None, &body, 0)?,
                Err(error) => self.put(&pending, Some(error), &[], 0)?,
            }
        }
        Ok(())
    }

    fn answer(
        &mut self,
        pending: &Pending,
        error: Option<Errno>,
        body: &[u8],
    ) -> Result<(), DeviceError> {
        match error {
            Some(error) => self.put(pending, Some(error), &[], 0),
            None => self.put(pending, None, body, 0),
        }
    }

    /// Writes an answer into the guest's buffers, where `filled` bytes of content are already.
    fn put(
        &mut self,
        pending: &Pending,
        error: Option<Errno>,
        body: &[u8],
        filled: usize,
    ) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let room: usize = pending.room.iter().map(|(_, len)| len).sum();
        let fits = OUT_HEADER + body.len() <= room;
        let (error, body) = match fits {
            true => (error, body),
            // The guest left less room than its request needs.
            false => (Some(Errno::IO), &[][..]),
        };
        let header = out_header(pending.unique, error, body.len() + filled);
        let message = [&header[..], body].concat();
        let mut left = &message[..];
        for &(address, len) in &pending.room {
            let (part, rest) = left.split_at(left.len().min(len));
            let written = active.ram.write_slice(part, address);
            written.map_err(|_| DEVICE.driver_error("an answer's room is outside RAM"))?;
            left = rest;
        }
        let written = u32::try_from(message.len() + filled).unwrap_or(u32::MAX);
        active.queues[pending.slot].push_used(&active.ram, pending.head, written)
    }

    /// Ends the connection to a server that is dead, hangs or is hostile. All of its requests fail,
    /// and all that come.
    fn give_up(&mut self, reason: &str) -> Result<(), DeviceError> {
        tracing::error!(tag = self.tag, reason, "a share is not served any more");
        self.session.handle.set(reason.to_owned());
        if let (Some(active), Some(backend)) = (&self.active, &self.session.backend) {
            let _ = active.events.remove(backend);
        }
        self.session.backend = None;
        self.session.files.clear();
        let waits = |(tag, pending): (&u64, &Pending)| {
            let waits = pending.work.waits_since().is_some();
            waits.then_some(*tag)
        };
        let tags: Vec<u64> = self.session.pending.iter().filter_map(waits).collect();
        for tag in tags {
            if let Some(pending) = self.session.pending.remove(&tag) {
                self.put(&pending, Some(Errno::IO), &[], 0)?;
            }
        }
        Ok(())
    }

    /// Gives the server up if a request waits for it for too long.
    fn check_time(&mut self) -> Result<(), DeviceError> {
        let taken = self.session.timer.take();
        taken.map_err(DEVICE.host_error("read a timer"))?;
        let Some(oldest) = self.session.oldest() else {
            return Ok(());
        };
        if oldest.elapsed() >= ANSWER_LIMIT {
            return self.give_up("the server did not answer for a minute");
        }
        self.session.arm(ANSWER_LIMIT - oldest.elapsed())
    }

    /// Goes on with the requests that were held back.
    fn go_on(&mut self) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.session.held_back) {
            let slots = self.active.as_ref().map_or(0, |active| active.queues.len());
            (0..slots).try_for_each(|slot| self.serve(slot))?;
        }
        self.flush()?;
        self.signal()
    }

    /// Waits for all requests. A server that does not answer in time is given up.
    fn drain(&mut self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + PAUSE_LIMIT;
        loop {
            self.session.workers.drain();
            self.finish()?;
            self.flush()?;
            self.receive()?;
            let waits = self.session.has_asked();
            let Some(backend) = self.session.backend.as_ref().filter(|_| waits) else {
                if self.session.pending.is_empty() {
                    return Ok(());
                }
                continue;
            };
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, backend.queued() > 0);
            if let Err(error) = backend.wait(deadline, flags) {
                self.give_up(&format!(
                    "the server did not answer before a pause: {error}"
                ))?;
            }
        }
    }

    fn signal(&mut self) -> Result<(), DeviceError> {
        let mut active = self.active.iter_mut();
        active.try_for_each(RequestQueues::signal)
    }

    fn requeue_all(&self) -> Result<(), DeviceError> {
        self.active.iter().try_for_each(RequestQueues::requeue_all)
    }

    fn decode(&self, bytes: &[u8]) -> Result<FsState, DeviceError> {
        let saved = FsState::decode(bytes)?;
        match saved.tag == self.tag {
            true => Ok(saved),
            false => Err(DEVICE.state_error(format_args!(
                "it is of the share `{}`, and this one is `{}`",
                saved.tag.escape_debug(),
                self.tag
            ))),
        }
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> DeviceName {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(RequestQueues::new(DEVICE, activation));
        self.register()?;
        // The event loop serves the queues: a vCPU's thread may neither send nor start threads.
        self.requeue_all()
    }

    fn notify_queue(&mut self, queue: u16) -> Result<(), DeviceError> {
        let slot = self.active.as_ref().and_then(|it| it.slot_of(queue));
        slot.map_or(Ok(()), |slot| self.serve(slot))
    }

    fn handle_event(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        match token {
            TOKEN_SERVER => {
                self.flush()?;
                self.receive()?;
            }
            TOKEN_WORKERS => self.finish()?,
            _ => self.check_time()?,
        }
        self.go_on()
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.drain()?;
        self.session.held_back = false;
        self.unregister();
        self.signal()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.register()?;
        self.requeue_all()
    }

    fn reset(&mut self) {
        // Workers use the RAM. What the server still answers is for nobody.
        self.session.workers.drain();
        drop(self.session.workers.take_done());
        self.unregister();
        self.active = None;
        self.session.pending.clear();
        self.session.files.clear();
        self.session.held_back = false;
        let tag = self.session.new_tag();
        if let Some(backend) = &mut self.session.backend {
            // It is sent with the next request, by the event loop's thread.
            backend.clear();
            backend.push(tag, Kind::Reset, Vec::new());
        }
    }

    fn queues(&self) -> Vec<(u16, &Queue)> {
        let active = self.active.iter();
        active.flat_map(RequestQueues::indexed).collect()
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let tables = match &self.session.backend {
            None => None,
            Some(backend) => {
                let saved = backend.save(self.session.next_tag + 1);
                let host = DEVICE.host_error("save what the server of a share knows");
                Some(saved.map_err(|error| host(error.into()))?)
            }
        };
        let tag = self.tag.clone();
        FsState { tag, tables }.encode()
    }

    fn check_state(&self, state: &[u8]) -> Result<u64, DeviceError> {
        self.decode(state).map(|_fits| self.features())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let saved = self.decode(state)?;
        let tag = self.session.new_tag();
        let Some(backend) = &mut self.session.backend else {
            return Ok(());
        };
        backend.clear();
        let restored = backend.restore(tag, saved.tables.as_deref());
        match restored {
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::FBIG) => {
                Err(DEVICE.state_error("the server of the share cannot read what it knew"))
            }
            Err(error) => {
                let host = DEVICE.host_error("hand the server of a share what it knew");
                Err(host(error.into()))
            }
        }
    }
}

impl Drop for Fs {
    /// Waits for the workers, which use the RAM.
    fn drop(&mut self) {
        self.reset();
    }
}
