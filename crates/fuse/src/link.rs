//! The connection between a VM's process and the server of one of its shares: a Unix socket that
//! keeps the borders of messages (`SOCK_SEQPACKET`).
//!
//! The VM's process sends a [`Request`] with a tag of its choice, and the server answers with one
//! [`Reply`] of the same tag, or with several of which all but the last are marked
//! ([`Reply::more`]), or not at all (requests to forget). Descriptors travel from the server to the
//! VM's process only, and are always of regular files: with them the VM's process reads and writes
//! between a file and the guest's memory without another copy. Neither side trusts the other: a
//! message that is no message ends the connection.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

/// The version of what both sides say to each other. Programs of different versions do not work
/// together.
pub const VERSION: u32 = 1;
/// The most bytes of a message: an extended attribute of the largest size, its name, and headers.
/// It is less than what the kernel lets a socket hold by default.
pub const MAX_MESSAGE: usize = 68 << 10;
/// The number of bytes before the content of a message.
pub const HEADER: usize = 16;
/// The most bytes of content in a message.
pub const MAX_CONTENT: usize = MAX_MESSAGE - HEADER;
/// The most bytes of the tables that a server saves and takes over: some hundred thousand files. They
/// are a part of a machine's state, which is bounded as well.
pub const MAX_TABLES: usize = 6 << 20;

/// What a launcher tells a server, as JSON in the first message. The server answers with a
/// [`Report`]; then the launcher passes its end of the socket to the VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Welcome {
    /// [`VERSION`] of the launcher.
    pub version: u32,
    /// The directory on the host, an absolute path in UTF-8.
    pub directory: String,
    /// The device that the directory is on, and its inode: what the launcher has checked is what is
    /// served.
    pub identity: (u64, u64),
    /// Whether nothing may be written.
    pub read_only: bool,
    /// The guest's user and group that own what the directory's owner owns on the host.
    pub guest_owner: (u32, u32),
    /// A directory on which the server mounts its root.
    pub spot: String,
    /// The server's cgroup, which exists; `None` on hosts without one.
    pub cgroup: Option<String>,
}

/// The server's answer to its launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The server is in its jail, which lacks these layers, each with the reason.
    Ready {
        /// What the host could not provide.
        missing: Vec<String>,
    },
    /// The share cannot be served.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What a VM's process asks of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A request of the guest, with its FUSE header. Reads and writes of regular files are not among
    /// them.
    Guest = 0,
    /// The descriptor of the open file with the handle in the content (8 bytes).
    Descriptor = 1,
    /// All that the server knows of the guest's nodes and handles.
    Save = 2,
    /// A part of the tables to take over; more parts follow.
    Restore = 3,
    /// The last part of the tables to take over.
    RestoreEnd = 4,
    /// The guest has reset its device: nodes and handles are forgotten.
    Reset = 5,
}

impl Kind {
    fn from_number(number: u32) -> Option<Self> {
        let kinds = [
            Self::Guest,
            Self::Descriptor,
            Self::Save,
            Self::Restore,
            Self::RestoreEnd,
            Self::Reset,
        ];
        kinds.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// A message to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The number that the reply carries.
    pub tag: u64,
    /// What is asked.
    pub kind: Kind,
    /// The content.
    pub content: &'a [u8],
}

impl<'a> Request<'a> {
    /// Encodes the header.
    pub fn header(&self) -> [u8; HEADER] {
        header(self.tag, self.kind as u32, 0)
    }

    /// Decodes a message.
    pub fn decode(message: &'a [u8]) -> Option<Self> {
        let (tag, kind, flags, content) = split(message)?;
        let kind = Kind::from_number(kind)?;
        (flags == 0).then_some(Self { tag, kind, content })
    }
}

/// The server's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    /// The request's tag.
    pub tag: u64,
    /// Why the request failed.
    pub error: Option<Errno>,
    /// Whether more messages of this reply follow.
    pub more: bool,
    /// The content; the body of a FUSE reply without its header.
    pub content: &'a [u8],
}

impl<'a> Reply<'a> {
    const MORE: u32 = 1;

    /// Encodes the header.
    pub fn header(&self) -> [u8; HEADER] {
        let error = self.error.map_or(0, |error| error.raw_os_error() as u32);
        header(self.tag, error, if self.more { Self::MORE } else { 0 })
    }

    /// Decodes a message.
    pub fn decode(message: &'a [u8]) -> Option<Self> {
        let (tag, error, flags, content) = split(message)?;
        let error = match error {
            0 => None,
            // The numbers of errors that Linux has.
            1..4096 => Some(Errno::from_raw_os_error(error as i32)),
            _ => return None,
        };
        let more = flags == Self::MORE;
        (more || flags == 0).then_some(Self {
            tag,
            error,
            more,
            content,
        })
    }
}

fn header(tag: u64, word: u32, flags: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&tag.to_le_bytes());
    bytes[8..12].copy_from_slice(&word.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

fn split(message: &[u8]) -> Option<(u64, u32, u32, &[u8])> {
    let (tag, rest) = message.split_first_chunk()?;
    let (word, rest) = rest.split_first_chunk()?;
    let (flags, content) = rest.split_first_chunk()?;
    let (word, flags) = (u32::from_le_bytes(*word), u32::from_le_bytes(*flags));
    Some((u64::from_le_bytes(*tag), word, flags, content))
}

/// Makes a connection. Both ends are close-on-exec.
///
/// # Errors
/// The system's answer.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socketpair(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// Whether a call waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until it can be done.
    Yes,
    /// Not at all: [`Errno::AGAIN`].
    No,
}

/// Sends one message, whole or not at all, with at most one descriptor.
///
/// # Errors
/// The system's answer.
pub fn send(
    socket: impl AsFd,
    header: &[u8; HEADER],
    content: &[u8],
    file: Option<BorrowedFd<'_>>,
    wait: Wait,
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
    if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(Errno::INVAL);
    }
    let slices = [IoSlice::new(header), IoSlice::new(content)];
    let mut flags = SendFlags::NOSIGNAL;
    if wait == Wait::No {
        flags |= SendFlags::DONTWAIT;
    }
    loop {
        match sendmsg(&socket, &slices, &mut ancillary, flags) {
            Err(Errno::INTR) => {}
            result => return result.map(drop),
        }
    }
}

/// Receives one message into `buffer`, which is [`MAX_MESSAGE`] long, and the descriptor that came
/// with it. Returns the number of bytes, which is 0 when the other side has gone.
///
/// # Errors
/// The system's answer; [`Errno::MSGSIZE`] for a message that is too long or has more than one
/// descriptor.
pub fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    wait: Wait,
) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if wait == Wait::No {
        flags |= RecvFlags::DONTWAIT;
    }
    let received = loop {
        let mut slices = [IoSliceMut::new(buffer)];
        match recvmsg(&socket, &mut slices, &mut ancillary, flags) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut file = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(arrived) = message {
            file = arrived.last().or(file);
        }
    }
    let lost = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
    match received.flags.intersects(lost) {
        true => Err(Errno::MSGSIZE),
        false => Ok((received.bytes, file)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_one_by_one_with_their_descriptor() {
        let (ours, theirs) = pair().unwrap();
        let request = Request {
            tag: 7,
            kind: Kind::Descriptor,
            content: b"12345678",
        };
        let header = request.header();
        send(&ours, &header, request.content, None, Wait::No).unwrap();
        send(&ours, &header, b"", Some(ours.as_fd()), Wait::No).unwrap();
        let mut buffer = vec![0; MAX_MESSAGE];
        let (len, file) = receive(&theirs, &mut buffer, Wait::No).unwrap();
        assert_eq!(Request::decode(&buffer[..len]), Some(request));
        assert!(file.is_none());
        let (len, file) = receive(&theirs, &mut buffer, Wait::No).unwrap();
        assert_eq!(len, HEADER);
        assert!(file.is_some());
        let none = receive(&theirs, &mut buffer, Wait::No);
        assert_eq!(none.unwrap_err(), Errno::AGAIN);
        drop((ours, file));
        assert_eq!(receive(&theirs, &mut buffer, Wait::Yes).unwrap().0, 0);
    }

    #[test]
    fn the_largest_message_fits_the_socket_and_a_larger_one_is_refused() {
        let (ours, theirs) = pair().unwrap();
        let mut buffer = vec![0; MAX_MESSAGE];
        let largest = vec![1; MAX_CONTENT];
        send(&ours, &[0; HEADER], &largest, None, Wait::No).unwrap();
        assert_eq!(
            receive(&theirs, &mut buffer, Wait::No).unwrap().0,
            MAX_MESSAGE
        );
        let larger = vec![1; MAX_CONTENT + 1];
        send(&ours, &[0; HEADER], &larger, None, Wait::No).unwrap();
        let refused = receive(&theirs, &mut buffer, Wait::No);
        assert_eq!(refused.unwrap_err(), Errno::MSGSIZE);
    }

    #[test]
    fn replies_keep_their_error_and_nothing_else_is_one() {
        let reply = Reply {
            tag: 1,
            error: Some(Errno::STALE),
            more: true,
            content: &[],
        };
        assert_eq!(Reply::decode(&reply.header()), Some(reply));
        let mut bad = reply.header();
        bad[10] = 1;
        assert_eq!(Reply::decode(&bad), None);
        let mut bad = reply.header();
        bad[12] = 2;
        assert_eq!(Reply::decode(&bad), None);
        assert_eq!(Reply::decode(&bad[1..]), None);
        assert_eq!(Request::decode(&header(0, 6, 0)), None);
    }
}
