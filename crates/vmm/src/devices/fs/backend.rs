//! The device's end of the connection to the share's server.
//!
//! The server may be slow, dead or hostile: nothing here waits without a deadline, and a message that
//! is none ends the connection.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use clone_fuse::link::{self, Kind, MAX_CONTENT, MAX_MESSAGE, MAX_TABLES, Reply, Request, Wait};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FileType;
use rustix::io::Errno;

/// The longest wait for a saved state, and for a server to take one over.
const TABLES_LIMIT: Duration = Duration::from_secs(5);

/// A reply of the server.
pub(super) struct Received {
    pub(super) tag: u64,
    pub(super) error: Option<Errno>,
    pub(super) content: Vec<u8>,
    pub(super) file: Option<std::fs::File>,
}

/// The connection.
pub(super) struct Backend {
    socket: OwnedFd,
    outgoing: VecDeque<(u64, Kind, Vec<u8>)>,
    /// Since when the server takes nothing.
    blocked_since: Option<Instant>,
    /// The room for a message, from the first one on.
    buffer: Vec<u8>,
}

impl Backend {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            outgoing: VecDeque::new(),
            blocked_since: None,
            buffer: Vec::new(),
        }
    }

    /// Queues a message.
    pub(super) fn push(&mut self, tag: u64, kind: Kind, content: Vec<u8>) {
        self.outgoing.push_back((tag, kind, content));
    }

    /// The number of messages that wait to be sent.
    pub(super) fn queued(&self) -> usize {
        self.outgoing.len()
    }

    /// Since when messages wait for the server to take one.
    pub(super) fn blocked_since(&self) -> Option<Instant> {
        self.blocked_since
    }

    /// Forgets the messages that were not sent.
    pub(super) fn clear(&mut self) {
        self.outgoing.clear();
        self.blocked_since = None;
    }

    /// Sends what can be sent.
    ///
    /// # Errors
    /// The connection has ended.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while let Some((tag, kind, content)) = self.outgoing.front() {
            match self.send(*tag, *kind, content, Wait::No) {
                Err(Errno::AGAIN | Errno::NOBUFS) => {
                    self.blocked_since.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                sent => sent?,
            }
            self.blocked_since = None;
            self.outgoing.pop_front();
        }
        Ok(())
    }

    fn send(&self, tag: u64, kind: Kind, content: &[u8], wait: Wait) -> Result<(), Errno> {
        let header = Request { tag, kind, content }.header();
        link::send(&self.socket, &header, content, None, wait)
    }

    /// The next reply, if one has come. Guests' replies are never in several messages.
    ///
    /// # Errors
    /// The connection has ended, or the server said what is no reply.
    pub(super) fn receive(&mut self) -> Result<Option<Received>, Errno> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(MAX_MESSAGE, 0);
        let received = self.receive_into(&mut buffer);
        self.buffer = buffer;
        match received {
            Ok((received, false)) => Ok(Some(received)),
            Ok((_, true)) => Err(Errno::PROTO),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A reply, and whether more of it follows.
    fn receive_into(&self, buffer: &mut [u8]) -> Result<(Received, bool), Errno> {
        let (len, file) = link::receive(&self.socket, buffer, Wait::No)?;
        if len == 0 {
            return Err(Errno::CONNRESET);
        }
        let reply = Reply::decode(&buffer[..len]).ok_or(Errno::PROTO)?;
        // Anything else could keep a reader waiting, or be more than a file.
        if let Some(file) = &file {
            let kind = FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode);
            if kind != FileType::RegularFile {
                return Err(Errno::PROTO);
            }
        }
        let received = Received {
            tag: reply.tag,
            error: reply.error,
            content: reply.content.to_vec(),
            file: file.map(std::fs::File::from),
        };
        Ok((received, reply.more))
    }

    /// Waits until the server has said something.
    ///
    /// # Errors
    /// [`Errno::TIMEDOUT`] after `deadline`.
    pub(super) fn wait(&self, deadline: Instant, flags: PollFlags) -> Result<(), Errno> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = left.try_into().map_err(|_| Errno::INVAL)?;
            let mut fds = [PollFd::new(&self.socket, flags)];
            match poll(&mut fds, Some(&timeout)) {
                Err(Errno::INTR) => {}
                Ok(0) => return Err(Errno::TIMEDOUT),
                result => return result.map(drop),
            }
        }
    }

    /// The server's tables. No request of the guest may be in progress.
    ///
    /// # Errors
    /// The server fails, or does not answer in time.
    pub(super) fn save(&self, tag: u64) -> Result<Vec<u8>, Errno> {
        let deadline = Instant::now() + TABLES_LIMIT;
        self.send_before(deadline, tag, Kind::Save, &[])?;
        self.collect(deadline, tag)
    }

    /// Has the server take over saved tables, or none.
    ///
    /// # Errors
    /// The server fails, refuses them, or does not answer in time.
    pub(super) fn restore(&self, tag: u64, tables: Option<&[u8]>) -> Result<(), Errno> {
        let deadline = Instant::now() + TABLES_LIMIT;
        let Some(mut left) = tables else {
            self.send_before(deadline, tag, Kind::Reset, &[])?;
            return self.collect(deadline, tag).map(drop);
        };
        loop {
            let (part, rest) = left.split_at(left.len().min(MAX_CONTENT));
            let kind = match rest {
                [] => Kind::RestoreEnd,
                _ => Kind::Restore,
            };
            self.send_before(deadline, tag, kind, part)?;
            left = rest;
            if left.is_empty() {
                return self.collect(deadline, tag).map(drop);
            }
        }
    }

    fn send_before(
        &self,
        deadline: Instant,
        tag: u64,
        kind: Kind,
        content: &[u8],
    ) -> Result<(), Errno> {
        loop {
            match self.send(tag, kind, content, Wait::No) {
                Err(Errno::AGAIN | Errno::NOBUFS) => self.wait(deadline, PollFlags::OUT)?,
                result => return result,
            }
        }
    }

    /// The whole reply with this tag. Replies to earlier requests are dropped.
    fn collect(&self, deadline: Instant, tag: u64) -> Result<Vec<u8>, Errno> {
        let (mut all, mut buffer) = (Vec::new(), vec![0; MAX_MESSAGE]);
        loop {
            let (received, more) = match self.receive_into(&mut buffer) {
                Err(Errno::AGAIN) => {
                    self.wait(deadline, PollFlags::IN)?;
                    continue;
                }
                received => received?,
            };
            if received.tag != tag {
                continue;
            }
            if let Some(error) = received.error {
                return Err(error);
            }
            all.extend_from_slice(&received.content);
            match more {
                _ if all.len() > MAX_TABLES => return Err(Errno::FBIG),
                false => return Ok(all),
                true => {}
            }
        }
    }
}

impl AsFd for Backend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
