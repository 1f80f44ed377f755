//! One client connection of the control socket: reads requests and writes answers.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use clone_api::descriptors;
use clone_vmm::event_loop::Registrar;
use vmm_sys_util::epoll::EventSet;

use super::http::{self, MAX_BODY, MAX_HEAD, Parsed, Request, Response};

/// The most bytes read in one event, so that a client that sends without end does not occupy the
/// loop.
const READ_AT_ONCE: usize = 16 << 10;
/// The most files received with one request: two for each of the most disks of a VM, and a few more.
const MAX_FILES: usize = 64;
/// The most bytes of answers that may wait for a client; while there are more, the client's
/// requests wait as well.
const MAX_OUTPUT: usize = 128 << 10;

/// Whether the client wants to keep the connection.
type KeepAlive = bool;

/// A connection and its state.
pub(super) struct Connection {
    /// The connection's id. Ids are never reused, so a late answer reaches its own connection or
    /// none.
    pub(super) id: u64,
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The number of bytes of `output` that were sent.
    sent: usize,
    /// Whether the connection accepts no more requests: the waiting output is sent, then it is
    /// closed.
    closing: bool,
    /// Whether the client has closed its sending side.
    finished: bool,
    /// The files received for the next request.
    files: Vec<OwnedFd>,
    /// Whether another thread works on a request, and whether that request keeps the connection. No
    /// other request is handled meanwhile.
    pending: Option<KeepAlive>,
    watched: EventSet,
    pub(super) last_active: u64,
}

impl Connection {
    /// Makes a connection whose stream is already registered for input.
    pub(super) fn new(stream: UnixStream, id: u64, now: u64) -> Self {
        Self {
            id,
            stream,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            closing: false,
            finished: false,
            files: Vec::new(),
            pending: None,
            watched: EventSet::IN,
            last_active: now,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads, answers and writes as far as `ready` allows; returns false when the connection is
    /// finished. `answer` returns `None` if the answer comes later by [`Connection::complete`].
    pub(super) fn advance(
        &mut self,
        ready: EventSet,
        mut answer: impl FnMut(&Request<'_>, Vec<OwnedFd>) -> Option<Response>,
    ) -> io::Result<bool> {
        if ready.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) && !self.closing {
            self.read()?;
        } else if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            return Ok(false);
        }
        loop {
            self.answer_requests(&mut answer);
            self.write()?;
            // When the output is sent, the requests that waited for room are answered.
            if self.waiting() > 0 || !self.has_request() {
                break;
            }
        }
        // An incomplete request at the end of the input is ignored.
        self.closing |= self.finished && self.pending.is_none() && !self.has_request();
        Ok(!(self.closing && self.waiting() == 0 && self.pending.is_none()))
    }

    /// Queues the answer to the pending request. The caller then calls [`Connection::advance`],
    /// which sends it.
    pub(super) fn complete(&mut self, response: &Response) {
        if let Some(keep_alive) = self.pending.take() {
            self.closing |= !keep_alive;
            response.write(keep_alive, &mut self.output);
        }
    }

    /// Registers for input while more may be read, and for output while answers wait.
    pub(super) fn watch(&mut self, registrar: &Registrar, token: u32) -> io::Result<()> {
        let mut wanted = EventSet::empty();
        if !self.closing
            && !self.finished
            && self.waiting() < MAX_OUTPUT
            && self.input.len() < MAX_HEAD + MAX_BODY
        {
            wanted |= EventSet::IN;
        }
        if self.waiting() > 0 {
            wanted |= EventSet::OUT;
        }
        if wanted != self.watched {
            registrar.modify(&self.stream, token, wanted)?;
            self.watched = wanted;
        }
        Ok(())
    }

    fn waiting(&self) -> usize {
        self.output.len() - self.sent
    }

    fn has_request(&self) -> bool {
        !self.closing
            && self.pending.is_none()
            && !self.input.is_empty()
            && !matches!(http::parse(&self.input), Parsed::Partial)
    }

    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0; 4096];
        let mut room = (MAX_HEAD + MAX_BODY)
            .saturating_sub(self.input.len())
            .min(READ_AT_ONCE);
        while room > 0 {
            let part = room.min(chunk.len());
            match self.receive(&mut chunk[..part]) {
                Ok(0) => {
                    // The client sends no more, but may still read.
                    self.finished = true;
                    break;
                }
                Ok(count) => {
                    self.input.extend_from_slice(&chunk[..count]);
                    room -= count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Receives bytes, and the files sent with them.
    fn receive(&mut self, chunk: &mut [u8]) -> io::Result<usize> {
        let count = descriptors::receive(&self.stream, chunk, &mut self.files)?;
        if self.files.len() > MAX_FILES {
            return Err(io::Error::other("more files than a request can have"));
        }
        Ok(count)
    }

    fn answer_requests(
        &mut self,
        answer: &mut impl FnMut(&Request<'_>, Vec<OwnedFd>) -> Option<Response>,
    ) {
        let mut done = 0;
        while !self.closing
            && self.pending.is_none()
            && self.waiting() < MAX_OUTPUT
            && done < self.input.len()
        {
            match http::parse(&self.input[done..]) {
                Parsed::Partial => break,
                Parsed::Complete(request, length) => {
                    let files = std::mem::take(&mut self.files);
                    match answer(&request, files) {
                        Some(response) => {
                            self.closing = !request.keep_alive;
                            response.write(request.keep_alive, &mut self.output);
                        }
                        None => self.pending = Some(request.keep_alive),
                    }
                    done += length;
                }
                Parsed::Bad(error) => {
                    self.closing = true;
                    Response::error(&error).write(false, &mut self.output);
                }
            }
        }
        self.input.drain(..done);
        if self.input.is_empty() {
            // An idle connection keeps no buffer.
            self.input = Vec::new();
        }
    }

    fn write(&mut self) -> io::Result<()> {
        while self.waiting() > 0 {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.output = Vec::new();
        self.sent = 0;
        Ok(())
    }
}
