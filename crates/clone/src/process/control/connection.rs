//! One client of the control socket: bytes in, requests out, answers back.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use clone_vmm::event_loop::Registrar;
use vmm_sys_util::epoll::EventSet;

use super::http::{self, MAX_BODY, MAX_HEAD, Parsed, Request, Response};

/// Read in one event, so that a client that sends without end does not hold the loop.
const READ_AT_ONCE: usize = 16 << 10;
/// Answers that may wait for a client; while there are more, its requests wait too.
const MAX_OUTPUT: usize = 128 << 10;

/// A connection and what is under way on it.
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of `output` was sent.
    sent: usize,
    /// No more requests: what waits is sent, then it is closed.
    closing: bool,
    watched: EventSet,
    pub(super) last_active: u64,
}

impl Connection {
    /// A connection whose stream is watched for input.
    pub(super) fn new(stream: UnixStream, now: u64) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            closing: false,
            watched: EventSet::IN,
            last_active: now,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Does what `ready` allows; false where the connection is done with.
    pub(super) fn advance(
        &mut self,
        ready: EventSet,
        mut answer: impl FnMut(&Request<'_>) -> Response,
    ) -> io::Result<bool> {
        if ready.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) && !self.closing {
            self.read()?;
        } else if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            return Ok(false);
        }
        loop {
            self.answer_requests(&mut answer);
            self.write()?;
            // Once there is room again, requests that waited for it are answered.
            if self.waiting() > 0 || !self.has_request() {
                break;
            }
        }
        Ok(!(self.closing && self.waiting() == 0))
    }

    /// Watches for input while more is wanted, and for room while answers wait.
    pub(super) fn watch(&mut self, registrar: &Registrar, token: u32) -> io::Result<()> {
        let mut wanted = EventSet::empty();
        if !self.closing && self.waiting() < MAX_OUTPUT && self.input.len() < MAX_HEAD + MAX_BODY {
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
            match self.stream.read(&mut chunk[..part]) {
                Ok(0) => {
                    // It sends no more, and may still read. Half a request is no request.
                    self.closing = matches!(http::parse(&self.input), Parsed::Partial);
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

    fn answer_requests(&mut self, answer: &mut impl FnMut(&Request<'_>) -> Response) {
        let mut done = 0;
        while !self.closing && self.waiting() < MAX_OUTPUT && done < self.input.len() {
            match http::parse(&self.input[done..]) {
                Parsed::Partial => break,
                Parsed::Complete(request, length) => {
                    self.closing = !request.keep_alive;
                    answer(&request).write(request.keep_alive, &mut self.output);
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
            // An idle connection keeps no room for a request that once was.
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
