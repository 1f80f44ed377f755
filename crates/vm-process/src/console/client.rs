//! One who is attached to the console.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use clone_vmm::event_loop::Registrar;
use vmm_sys_util::epoll::EventSet;

/// Output that may wait for one client.
const MAX_WAITING: usize = 128 << 10;

/// A client: its stream, what it has not read yet, and what it missed.
pub(super) struct Client {
    stream: UnixStream,
    waiting: VecDeque<u8>,
    missed: u64,
    watched: EventSet,
}

impl Client {
    /// A client whose stream is already watched for `watched`.
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

    /// Sends now what can be sent, keeps the rest, and drops what is too much.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.missed > 0 || self.waiting.len() + bytes.len() > MAX_WAITING {
            self.missed += bytes.len() as u64;
        } else {
            self.waiting.extend(bytes);
        }
        self.flush()
    }

    /// Sends what waits, as much as the stream takes.
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
                // An idle VM keeps no room for output that once was.
                self.waiting = VecDeque::new();
                return Ok(());
            }
            let notice = format!("\r\n[clone: {} bytes of output missed]\r\n", self.missed);
            self.missed = 0;
            self.waiting.extend(notice.as_bytes());
        }
    }

    /// Reads at most `room` bytes into `typed`; an error where the client is gone.
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

    /// Watches the stream for `input`, and for room where output waits.
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
