//! The host's side: new sockets and their opening lines, and the guest's connections to the host.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

/// The longest opening line of a host: `CONNECT 4294967295\n` and some spare bytes.
const MAX_LINE: usize = 32;

/// Connects the streams that the guest starts.
pub trait GuestConnector: Send {
    /// Returns a connected, non-blocking stream for the host port `port`. An error refuses the
    /// guest's connection. The call must not wait.
    fn connect(&mut self, port: u32) -> io::Result<UnixStream>;
}

/// Connects the guest to Unix sockets named `<base>_<port>`. This needs the right to make sockets
/// and to open that path, which a jailed process does not have.
#[derive(Debug)]
pub struct PathConnector {
    base: PathBuf,
}

impl PathConnector {
    /// For sockets beside `base`, the VM's own vsock path.
    pub fn new(base: &Path) -> Self {
        Self {
            base: base.to_owned(),
        }
    }
}

impl GuestConnector for PathConnector {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.base.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Unix sockets connect at once or, with a full backlog, refuse.
        rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)?;
        Ok(UnixStream::from(socket))
    }
}

/// The result of an attempt to accept a connection.
pub(super) enum Accepted {
    /// A new, non-blocking stream.
    Stream(UnixStream),
    /// No connection waits.
    NoConnection,
    /// The process has no file descriptors left, so the caller must try again later.
    NoDescriptors,
}

pub(super) fn accept(listener: &UnixListener) -> io::Result<Accepted> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        return match rustix::net::accept_with(listener, flags) {
            Ok(stream) => Ok(Accepted::Stream(UnixStream::from(stream))),
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            Err(Errno::AGAIN) => Ok(Accepted::NoConnection),
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                Ok(Accepted::NoDescriptors)
            }
            Err(error) => Err(error.into()),
        };
    }
}

/// The result of reading a host's opening line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The line is not complete.
    Incomplete,
    /// The line asks for this port of the guest.
    Port(u32),
    /// The line is not a greeting, or the host has closed the socket.
    Bad,
}

/// Reads the opening line `CONNECT <port>\n`, and no byte that follows it.
pub(super) fn read_greeting(stream: &UnixStream) -> Greeting {
    let mut line = [0; MAX_LINE];
    let len = match rustix::net::recv(stream, &mut line[..], RecvFlags::PEEK) {
        Ok((_, len)) if len > 0 => len,
        Err(Errno::AGAIN | Errno::INTR) => return Greeting::Incomplete,
        _ => return Greeting::Bad,
    };
    let Some(end) = line[..len].iter().position(|&byte| byte == b'\n') else {
        return if len < MAX_LINE {
            Greeting::Incomplete
        } else {
            Greeting::Bad
        };
    };
    let Some(port) = parse_greeting(&line[..end]) else {
        return Greeting::Bad;
    };
    let mut taken = [0; MAX_LINE];
    match rustix::net::recv(stream, &mut taken[..=end], RecvFlags::empty()) {
        Ok((_, len)) if len == end + 1 => Greeting::Port(port),
        _ => Greeting::Bad,
    }
}

fn parse_greeting(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_greeting_is_taken_without_what_follows_it() {
        let (mut host, mut device) = UnixStream::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        host.write_all(b"CONN").unwrap();
        assert_eq!(read_greeting(&device), Greeting::Incomplete);
        host.write_all(b"ECT 52\nhello").unwrap();
        assert_eq!(read_greeting(&device), Greeting::Port(52));
        let mut rest = [0; 16];
        assert_eq!(device.read(&mut rest).unwrap(), 5);
        assert_eq!(&rest[..5], b"hello");
    }

    #[test]
    fn anything_but_a_port_in_decimal_is_refused() {
        for bad in [
            "CONNECT \n",
            "CONNECT +5\n",
            "CONNECT 4294967296\n",
            "connect 5\n",
            "CONNECT 5 \n",
            "CONNECT 5\r\n",
            "\n",
            "GET / HTTP/1.1 and much more than that",
        ] {
            let (mut host, device) = UnixStream::pair().unwrap();
            device.set_nonblocking(true).unwrap();
            host.write_all(bad.as_bytes()).unwrap();
            assert_eq!(read_greeting(&device), Greeting::Bad, "{bad:?}");
        }
    }

    #[test]
    fn a_guest_port_leads_to_the_socket_beside_the_vms_own() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("vsock");
        let mut connector = PathConnector::new(&base);
        assert!(connector.connect(80).is_err());
        let listener = UnixListener::bind(dir.path().join("vsock_80")).unwrap();
        let mut guest = connector.connect(80).unwrap();
        guest.write_all(b"x").unwrap();
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
