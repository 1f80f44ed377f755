//! Waiting for one descriptor (poll(2)).

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until `fd` is readable, which a pidfd is when its process has ended. Returns false if it is
/// not after `limit`; without a limit, waits as long as it takes.
///
/// # Errors
/// The kernel's, such as a lack of memory. An interruption by a signal is none.
pub fn readable(fd: &impl AsFd, limit: Option<Duration>) -> io::Result<bool> {
    ready(fd, PollFlags::IN, limit)
}

/// The same as [`readable`] for an exceptional condition (`POLLPRI`), by which the kernel reports
/// changes of some of its own files.
///
/// # Errors
/// The same as of [`readable`].
pub fn exceptional(fd: &impl AsFd, limit: Option<Duration>) -> io::Result<bool> {
    ready(fd, PollFlags::PRI, limit)
}

fn ready(fd: &impl AsFd, events: PollFlags, limit: Option<Duration>) -> io::Result<bool> {
    // A limit beyond what the clock can hold is none.
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(fd, events)], left.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_pipe_is_readable_once_something_is_in_it() {
        let (read, mut write) = io::pipe().unwrap();
        assert!(!readable(&read, Some(Duration::ZERO)).unwrap());
        write.write_all(b"x").unwrap();
        assert!(readable(&read, Some(Duration::ZERO)).unwrap());
        assert!(readable(&read, Some(Duration::MAX)).unwrap());
        assert!(readable(&read, None).unwrap());
    }
}
