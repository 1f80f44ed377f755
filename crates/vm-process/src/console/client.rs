//! One client that is attached to the console.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use clone_vmm::event_loop::Registrar;
use vmm_sys_util::epoll::EventSet;

/// The most bytes of output that may wait for one client.
const MAX_WAITING: usize = 128 << 10;

/// A client: its stream, the output that waits for it, and the amount that it missed.
pub(super) struct Client {
    stream: UnixStream,
    waiting: VecDeque<u8>,
    missed: u64,
    watched: EventSet,
}

impl Client {
    /// Makes a client whose stream is already registered for `watched`.
    pub(super) fn new(stream: UnixStream, watched: EventSet) -> Self {
        Self {
            stream,
            waiting: VecDeque::new(),
            missed: 0,
            watched,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends `bytes` as far as the stream takes them, keeps the rest, and drops the excess over
    /// [`MAX_WAITING`].
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.missed > 0 || self.waiting.len() + bytes.len() > MAX_WAITING {
            self.missed += bytes.len() as u64;
        } else {
            self.waiting.extend(bytes);
        }
        self.flush()
    }

    /// Sends waiting output, as much as the stream takes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        loop {
            while !self.waiting.is_empty() {
                let (head, _) = self.waiting.as_slices();
                match self.stream.write(head) {
                    Ok(sent) => drop(self.waiting.drain(..sent)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if self.missed == 0 {
                // An idle VM keeps no output buffer.
                self.waiting = VecDeque::new();
                return Ok(());
            }
            let notice = format!("\r\n[clone: {} bytes of output missed]\r\n", self.missed);
            self.missed = 0;
            self.waiting.extend(notice.as_bytes());
        }
    }

    /// Reads at most `room` bytes into `typed`; returns an error if the client has disconnected.
    pub(super) fn read(&mut self, typed: &mut VecDeque<u8>, room: usize) -> io::Result<()> {
        let mut buffer = [0; 512];
        let room = room.min(buffer.len());
        if room == 0 {
            return Ok(());
        }
        match self.stream.read(&mut buffer[..room]) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                typed.extend(&buffer[..count]);
                Ok(())
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Registers the stream for `input`, and for writing while output waits.
    pub(super) fn watch(
        &mut self,
        registrar: &Registrar,
        token: u32,
        input: EventSet,
    ) -> io::Result<()> {
        let mut wanted = input;
        if !self.waiting.is_empty() {
            wanted |= EventSet::OUT;
        }
        if wanted != self.watched {
            registrar.modify(&self.stream, token, wanted)?;
            self.watched = wanted;
        }
        Ok(())
    }
}
