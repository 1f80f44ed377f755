//! Notifications of the kernel that the packet filter's rules changed.
//!
//! Each change by any program makes a new generation of all rules. The generation's number can be
//! queried, and each new one is announced. Source: the Linux kernel's `nf_tables` netlink
//! interface.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};

use rtnetlink::sys::{Socket, SocketAddr};

use super::HostNetError;

/// `NETLINK_NETFILTER`, as netlink's protocols are numbered.
const NETFILTER: isize = libc::NETLINK_NETFILTER as isize;
/// `NFT_MSG_GETGEN` and `NFT_MSG_NEWGEN` of the subsystem `NFNL_SUBSYS_NFTABLES`.
const GET_GENERATION: u16 = 10 << 8 | 16;
const NEW_GENERATION: u16 = 10 << 8 | 15;
/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// `NFTA_GEN_ID`.
const GENERATION_ID: u16 = 1;

/// The sizes of netlink's header and of netfilter's after it.
const HEADER: usize = 16;
const NETFILTER_HEADER: usize = 4;

/// The number of the rules' current generation in this network namespace.
pub(super) fn generation() -> Result<u32, HostNetError> {
    query_generation().map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => HostNetError::NotAllowed {
            action: "looking at the packet filter's",
            object: "rules".to_owned(),
        },
        _ => HostNetError::Netlink(error),
    })
}

fn query_generation() -> io::Result<u32> {
    let mut socket = Socket::new(NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request(), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    parse(&answer)
}

fn request() -> Vec<u8> {
    let len = (HEADER + NETFILTER_HEADER) as u32;
    let mut message = len.to_ne_bytes().to_vec();
    message.extend(GET_GENERATION.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // The sequence number and the port are not needed for one request.
    message.extend([0; 8]);
    message.extend([0; NETFILTER_HEADER]);
    message
}

fn parse(answer: &[u8]) -> io::Result<u32> {
    let nonsense = || io::Error::new(ErrorKind::InvalidData, "an answer that makes no sense");
    let half = |at: usize| -> Option<u16> {
        Some(u16::from_ne_bytes(
            answer.get(at..)?.first_chunk().copied()?,
        ))
    };
    let payload = answer.get(HEADER..).ok_or_else(nonsense)?;
    if half(4) == Some(libc::NLMSG_ERROR as u16) {
        let code = payload.first_chunk().ok_or_else(nonsense)?;
        return Err(io::Error::from_raw_os_error(-i32::from_ne_bytes(*code)));
    }
    if half(4) != Some(NEW_GENERATION) {
        return Err(nonsense());
    }
    let mut at = HEADER + NETFILTER_HEADER;
    while let (Some(len), Some(kind)) = (half(at), half(at + 2)) {
        if kind == GENERATION_ID {
            let value = answer.get(at + 4..).and_then(|it| it.first_chunk());
            return value.map(|it| u32::from_be_bytes(*it)).ok_or_else(nonsense);
        }
        // An attribute of length 0 would loop forever.
        at += usize::from(len).max(4).next_multiple_of(4);
    }
    Err(nonsense())
}

/// Announcements of new generations.
pub(super) struct Announcements(Socket);

impl Announcements {
    /// Subscribes to the announcements in this thread's network namespace.
    pub(super) fn subscribe() -> io::Result<Self> {
        let mut socket = Socket::new(NETFILTER)?;
        socket.bind_auto()?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Discards all waiting announcements. Neither their content nor the loss of some matters.
    pub(super) fn drain(&self) {
        let mut buffer = Vec::with_capacity(4096);
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) | Ok(0) => return,
                Ok(_) => {}
            }
        }
    }
}

impl AsFd for Announcements {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut message = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(payload);
        message
    }

    #[test]
    fn a_generation_is_read_and_nonsense_refused() {
        let other = [8, 0, 2, 0, 9, 9, 9, 9];
        let id = [8, 0, 1, 0, 0, 0, 1, 2];
        let payload = [&[0; NETFILTER_HEADER][..], &other, &id].concat();
        assert_eq!(parse(&answer(NEW_GENERATION, &payload)).unwrap(), 0x102);
        for len in 0..payload.len() {
            parse(&answer(NEW_GENERATION, &payload[..len])).unwrap_err();
        }
        let endless = [&[0; NETFILTER_HEADER][..], &[0; 64]].concat();
        parse(&answer(NEW_GENERATION, &endless)).unwrap_err();
        let refused = answer(libc::NLMSG_ERROR as u16, &(-libc::EPERM).to_ne_bytes());
        let error = parse(&refused).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
