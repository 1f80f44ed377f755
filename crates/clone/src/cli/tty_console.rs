//! The user's end of a VM's serial console.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use clone_api::ApiError;
use clone_start::VmDir;
use clone_start::error::{Result, failed};
use rustix::event::{PollFd, PollFlags, poll};

use super::terminal::RawTerminal;

/// Ctrl-], which leaves the console.
const LEAVE: u8 = 0x1d;

/// The reason why a console session ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The user left.
    Left,
    /// The VM ended.
    Closed,
}

/// Connects standard input and output with the console until the user leaves or the VM ends.
pub(super) fn attach(dir: &VmDir) -> Result<End> {
    let path = dir.console_socket();
    let stream = UnixStream::connect(&path).map_err(failed("connect to the console", &path))?;
    let stdin = io::stdin();
    let raw = if stdin.is_terminal() {
        let raw = RawTerminal::enter(&stdin);
        Some(raw.map_err(|error| ApiError::internal(&error))?)
    } else {
        None
    };
    let end = relay(&stream, raw.is_some()).map_err(failed("use the console", &path));
    drop(raw);
    end
}

fn relay(mut stream: &UnixStream, can_leave: bool) -> io::Result<End> {
    let (stdin, mut stdout) = (io::stdin(), io::stdout());
    let mut buffer = [0; 4096];
    let mut input_open = true;
    loop {
        let (from_console, from_user) = {
            let mut fds = vec![PollFd::new(stream, PollFlags::IN)];
            if input_open {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            (ready(0), ready(1))
        };
        if from_console {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(End::Closed),
                // The VM ended before it read all of our input.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(End::Closed);
                }
                Ok(count) => {
                    stdout.write_all(&buffer[..count])?;
                    stdout.flush()?;
                }
                Err(error) => return Err(error),
            }
        }
        if from_user {
            // `Stdin` is not used, since `poll` does not see bytes in its buffer.
            let count = rustix::io::read(stdin.as_fd(), &mut buffer)?;
            let (typed, leave) = until_leave(&buffer[..count], can_leave);
            input_open = count > 0;
            match stream.write_all(typed) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(End::Closed),
                Err(error) => return Err(error),
            }
            if leave {
                return Ok(End::Left);
            }
        }
    }
}

/// The input before the key that leaves, and whether that key was typed.
fn until_leave(typed: &[u8], can_leave: bool) -> (&[u8], bool) {
    match typed.iter().position(|&key| key == LEAVE) {
        Some(at) if can_leave => (&typed[..at], true),
        _ => (typed, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_typed_before_leaving_still_goes_to_the_guest() {
        assert_eq!(until_leave(b"ls\n\x1dmore", true), (&b"ls\n"[..], true));
        assert_eq!(until_leave(b"ls\n", true), (&b"ls\n"[..], false));
        // A file piped in may hold any byte.
        assert_eq!(until_leave(b"a\x1db", false), (&b"a\x1db"[..], false));
    }
}
