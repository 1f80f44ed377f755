//! A pair of descriptors on which no call waits without end.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// One end of a migration's stream: what is read from, and what is written to. Both may be the same
/// socket, or two pipes.
///
/// The descriptors do not block, for whoever else has them open, too: every holder must use a `Link`.
#[derive(Debug)]
pub struct Link {
    input: OwnedFd,
    output: OwnedFd,
    patience: Duration,
}

impl Link {
    /// A link over these descriptors, on which a call fails after `patience` without any progress.
    ///
    /// # Errors
    /// The system's, for descriptors that cannot be made non-blocking.
    pub fn new(input: OwnedFd, output: OwnedFd, patience: Duration) -> io::Result<Self> {
        for fd in [&input, &output] {
            fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            input,
            output,
            patience,
        })
    }

    /// Sets the longest time without progress.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// The descriptors, to be passed to the process that goes on with the stream.
    pub fn descriptors(&self) -> [std::os::fd::BorrowedFd<'_>; 2] {
        [self.input.as_fd(), self.output.as_fd()]
    }

    /// Fills `bytes`, and reads no byte that follows.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], [`ErrorKind::UnexpectedEof`], or the system's.
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match rustix::io::read(&self.input, &mut bytes[filled..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.wait(&self.input, PollFlags::IN)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes `bytes`; an error says how many of them went before it.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] or the system's, with the number of bytes that were written.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut written = 0;
        while written < bytes.len() {
            match rustix::io::write(&self.output, &bytes[written..]) {
                Ok(count) => written += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    let waited = self.wait(&self.output, PollFlags::OUT);
                    waited.map_err(|error| (written, error))?;
                }
                Err(error) => return Err((written, error.into())),
            }
        }
        Ok(())
    }

    fn wait(&self, fd: &OwnedFd, events: PollFlags) -> io::Result<()> {
        let end = Instant::now() + self.patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let limit = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(fd, events)], Some(&limit)) {
                Ok(0) => return Err(ErrorKind::TimedOut.into()),
                // The next call tells what has happened.
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl io::Read for Link {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(&self.input, &mut *bytes) {
                Ok(count) => return Ok(count),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.wait(&self.input, PollFlags::IN)?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl io::Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = Self::write_all(self, bytes);
        written.map(|()| bytes.len()).map_err(|(_, error)| error)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair(patience: Duration) -> (Link, Link) {
        let (a, b) = UnixStream::pair().unwrap();
        let link = |stream: UnixStream| {
            let other = stream.try_clone().unwrap();
            Link::new(stream.into(), other.into(), patience).unwrap()
        };
        (link(a), link(b))
    }

    #[test]
    fn neither_a_silent_nor_a_stuck_peer_holds_a_call() {
        let (mut a, _b) = pair(Duration::from_millis(30));
        let silent = a.read_exact(&mut [0]).unwrap_err();
        assert_eq!(silent.kind(), ErrorKind::TimedOut);
        let (written, stuck) = a.write_all(&vec![0; 8 << 20]).unwrap_err();
        assert_eq!(stuck.kind(), ErrorKind::TimedOut);
        assert!(written > 0);
    }

    #[test]
    fn what_passes_is_whole_and_an_end_is_an_error() {
        let (mut a, mut b) = pair(Duration::from_secs(20));
        let sent: Vec<u8> = (0..3_000_000_u32).map(|it| it as u8).collect();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || a.write_all(&copy).unwrap());
        let mut received = vec![0; sent.len()];
        b.read_exact(&mut received).unwrap();
        assert!(received == sent);
        writer.join().unwrap();
        let ended = b.read_exact(&mut [0]).unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(b.write_all(&[0]).unwrap_err().0, 0);
    }
}
