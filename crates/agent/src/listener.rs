//! The agent's listening socket: vsock in a guest, a Unix socket in tests.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

/// A listening socket.
pub(crate) struct Listener(OwnedFd);

impl Listener {
    /// Listens on `vsock:PORT` or `unix:PATH`.
    pub(crate) fn open(address: &str) -> io::Result<Self> {
        match address.split_once(':') {
            Some(("vsock", port)) => {
                let port = port
                    .parse()
                    .map_err(|_| invalid("the port is not a number"))?;
                listen_vsock(port).map(Self)
            }
            Some(("unix", path)) => {
                let listener = UnixListener::bind(path)?;
                // A client that can connect has the agent's rights, so the socket is for its owner
                // only.
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
                Ok(Self(listener.into()))
            }
            _ => Err(invalid("neither vsock:PORT nor unix:PATH")),
        }
    }

    /// The next connection. Streams are read and written like files, whatever their kind.
    ///
    /// On vsock, only the host is accepted: a program of the guest that connects over the loopback
    /// would get root's rights.
    pub(crate) fn accept(&self) -> io::Result<File> {
        loop {
            let (stream, peer) = accept_from(self.0.as_raw_fd())?;
            let is_stranger = i32::from(peer.svm_family) == libc::AF_VSOCK
                && peer.svm_cid != libc::VMADDR_CID_HOST;
            if !is_stranger {
                return Ok(stream);
            }
        }
    }
}

/// Accepts a connection, with the vsock address that it comes from. For other families only the
/// address's family counts.
fn accept_from(listener: RawFd) -> io::Result<(File, libc::sockaddr_vm)> {
    // SAFETY: all-zero is a valid address of this type.
    let mut peer: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the address is a live value of the length that is given with it; a longer one is cut.
    let fd = unsafe {
        libc::accept4(
            listener,
            (&raw mut peer).cast(),
            &raw mut len,
            libc::SOCK_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: accept4 has just given us this descriptor, and nobody else knows it.
    Ok((unsafe { File::from_raw_fd(fd) }, peer))
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason.to_owned())
}

fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call with constant arguments.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: socket has just given us this descriptor, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid address of this type.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is a live value of the length that is given with it.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
    // SAFETY: plain system call on our own descriptor.
    if bound < 0 || unsafe { libc::listen(fd.as_raw_fd(), 128) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}
