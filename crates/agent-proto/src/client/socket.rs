//! A Unix socket on which no operation waits longer than a deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

use crate::deadline::Deadline;
use crate::error::ClientError;

/// Connects to the socket at `path`, whose owner may never accept.
pub(super) fn connect_by(path: &Path, deadline: Deadline) -> Result<UnixStream, ClientError> {
    let unreachable = |error: Errno| ClientError::Connect {
        path: path.display().to_string(),
        source: error.into(),
    };
    let address = SocketAddrUnix::new(path).map_err(unreachable)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(unreachable)?;
    let remaining = deadline.remaining().ok_or(ClientError::Late)?;
    // The timeout also bounds the wait for a place in the listener's backlog.
    set_socket_timeout(&socket, Timeout::Send, Some(remaining)).map_err(unreachable)?;
    match connect(&socket, &address) {
        Ok(()) => Ok(UnixStream::from(socket)),
        Err(Errno::AGAIN) => Err(ClientError::Late),
        Err(error) => Err(unreachable(error)),
    }
}

/// Reads available bytes, waiting for them at most until `deadline`. A stream without a deadline
/// may be silent; see [`super::Timing`].
pub(super) fn read_by(
    mut stream: &UnixStream,
    buffer: &mut [u8],
    deadline: Option<Deadline>,
) -> Result<usize, ClientError> {
    loop {
        let remaining = match deadline {
            Some(deadline) => Some(deadline.remaining().ok_or(ClientError::Late)?),
            None => None,
        };
        stream
            .set_read_timeout(remaining)
            .map_err(ClientError::Lost)?;
        match stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map_err(late_or_lost),
        }
    }
}

/// Writes all of `bytes` until `deadline`.
pub(super) fn write_by(
    mut stream: &UnixStream,
    mut bytes: &[u8],
    deadline: Deadline,
) -> Result<(), ClientError> {
    while !bytes.is_empty() {
        let remaining = deadline.remaining().ok_or(ClientError::Late)?;
        stream
            .set_write_timeout(Some(remaining))
            .map_err(ClientError::Lost)?;
        match stream.write(bytes) {
            Ok(0) => return Err(ClientError::Lost(io::ErrorKind::WriteZero.into())),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(late_or_lost(error)),
        }
    }
    Ok(())
}

/// Writes as much as the socket accepts without blocking, which may be nothing.
pub(super) fn write_now(stream: &UnixStream, bytes: &[u8]) -> Result<usize, ClientError> {
    match send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(sent) => Ok(sent),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(error) => Err(ClientError::Lost(error.into())),
    }
}

/// Waits until the stream can be read or written, and returns whether it can be read.
pub(super) fn wait_by(stream: &UnixStream, deadline: Deadline) -> Result<bool, ClientError> {
    let remaining = deadline.remaining().ok_or(ClientError::Late)?;
    let limit = Timespec::try_from(remaining)
        .map_err(|error| ClientError::Lost(io::Error::other(error)))?;
    let mut polled = [PollFd::new(stream, PollFlags::IN | PollFlags::OUT)];
    match poll(&mut polled, Some(&limit)) {
        Ok(0) => Err(ClientError::Late),
        Ok(_) => Ok(polled[0].revents() != PollFlags::OUT),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(ClientError::Lost(error.into())),
    }
}

/// Converts the error of a socket whose timeout has passed, which is reported as "would block".
fn late_or_lost(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::WouldBlock => ClientError::Late,
        _ => ClientError::Lost(error),
    }
}
