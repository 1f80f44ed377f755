//! Open files that travel with bytes over a Unix socket (`SCM_RIGHTS`, unix(7)).
//!
//! This is the only way in which our programs hand each other descriptors. Every descriptor stays
//! close-on-exec on both sides, so a child that another thread starts meanwhile never inherits it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most files that go with one message: the kernel takes no more.
pub const MAX_FILES: usize = 253;

/// Sends the beginning of `bytes`, which is not empty, with `files`; returns how many bytes went.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] for more than [`MAX_FILES`] files, else the system's answer.
pub fn send(socket: impl AsFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} files are too many for one message", files.len()),
        ));
    }
    let slices = [IoSlice::new(bytes)];
    Ok(sendmsg(
        socket,
        &slices,
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?)
}

/// Receives bytes into `chunk`, and adds the files that come with them to `files`; returns the
/// number of bytes, which is 0 at the end.
///
/// # Errors
/// The system's answer, or that files were lost since this process may have no more open.
pub fn receive(socket: impl AsFd, chunk: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(chunk)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut slices, &mut ancillary, flags)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(arrived) = message {
            files.extend(arrived);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("files that came with a message were lost"));
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    #[test]
    fn files_arrive_with_the_bytes_and_are_close_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"in the file").unwrap();
        file.rewind().unwrap();
        let sent = send(&ours, b"bytes", &[file.as_fd(), file.as_fd()]).unwrap();
        drop(ours);
        let (mut chunk, mut files) = ([0; 16], Vec::new());
        let count = receive(&theirs, &mut chunk, &mut files).unwrap();
        assert_eq!((sent, &chunk[..count]), (5, &b"bytes"[..]));
        assert_eq!(files.len(), 2);
        for file in &files {
            assert!(fcntl_getfd(file).unwrap().contains(FdFlags::CLOEXEC));
        }
        let mut text = String::new();
        File::from(files.remove(0))
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "in the file");
        assert_eq!(receive(&theirs, &mut chunk, &mut files).unwrap(), 0);
    }

    #[test]
    fn more_files_than_a_message_takes_are_refused() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let files = vec![ours.as_fd(); MAX_FILES + 1];
        let refused = send(&ours, b"!", &files).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(send(&ours, b"!", &files[1..]).unwrap(), 1);
    }
}
