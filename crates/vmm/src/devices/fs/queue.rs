//! The guest's requests: which of them the device carries out itself, and which are for the server.

use std::sync::Arc;

use clone_fuse::wire::{IN_HEADER, InHeader, Input, Invalid, OUT_HEADER, Transfer, op};
use rustix::io::Errno;

use crate::virtio::{DescriptorChain, DeviceError, ServedQueue};

/// The longest request that goes to the server: an extended attribute and its name.
const MAX_REQUEST: usize = 66 << 10;

/// A request of the guest.
#[derive(Debug)]
pub(super) enum FuseRequest {
    /// The server carries it out.
    Server(Vec<u8>),
    /// The device carries it out on open regular files.
    File(FileRequest),
    /// The device answers at once.
    Answer(Errno),
    /// There is nothing to do and no answer.
    Nothing,
}

/// A request on open regular files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileRequest {
    pub(super) handle: u64,
    /// The second file of a copy.
    pub(super) other: Option<u64>,
    pub(super) action: Action,
}

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        size: u32,
        append: bool,
    },
    Sync {
        only_data: bool,
    },
    Allocate {
        mode: u32,
        offset: u64,
        len: u64,
    },
    Seek {
        offset: u64,
        whence: u32,
    },
    Copy {
        from: u64,
        to: u64,
        len: u64,
    },
}

/// Reads the header and decides. The header's length must be that of the request, and a request that
/// is answered must have room for an answer.
pub(super) fn parse(
    queue: &ServedQueue,
    chain: &DescriptorChain<'_>,
) -> Result<(InHeader, FuseRequest), DeviceError> {
    let mut reader = chain.reader();
    let Ok(bytes) = reader.read_array::<IN_HEADER>() else {
        return Err(queue.driver_error("a request has no complete header"));
    };
    let header = InHeader::decode(&bytes);
    if header.len as usize != chain.readable_len() {
        return Err(queue.driver_error("a request is not as long as its header says"));
    }
    let is_answered = !matches!(header.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT);
    if is_answered && chain.writable_len() < OUT_HEADER {
        return Err(queue.driver_error("a request has no room for an answer"));
    }
    let mut fields = [0; 64];
    let len = reader.remaining().min(fields.len());
    let fields = &mut fields[..len];
    let mut front = chain.reader();
    let skipped = front.read_array::<IN_HEADER>().is_ok();
    if !skipped || front.read_exact(fields).is_err() {
        return Err(queue.driver_error("a request has no complete header"));
    }
    let request = match file_request(header.opcode, fields) {
        Some(Ok(request)) => FuseRequest::File(request),
        Some(Err(_)) => FuseRequest::Answer(Errno::INVAL),
        None => match header.opcode {
            op::INTERRUPT => FuseRequest::Nothing,
            // Nothing is kept back that a close would have to write.
            op::FLUSH | op::ACCESS | op::STATX => FuseRequest::Answer(Errno::NOSYS),
            _ if chain.readable_len() > MAX_REQUEST => FuseRequest::Answer(Errno::TOOBIG),
            _ => FuseRequest::Server(whole(chain)),
        },
    };
    Ok((header, request))
}

fn whole(chain: &DescriptorChain<'_>) -> Vec<u8> {
    let mut bytes = vec![0; chain.readable_len()];
    // As many bytes as there are cannot be too few.
    let _ = chain.reader().read_exact(&mut bytes);
    bytes
}

fn file_request(opcode: u32, fields: &[u8]) -> Option<Result<FileRequest, Invalid>> {
    let decode = match opcode {
        op::READ => read,
        op::WRITE => write,
        op::FSYNC => sync,
        op::FALLOCATE => allocate,
        op::LSEEK => seek,
        op::COPY_FILE_RANGE => copy,
        _ => return None,
    };
    Some(decode(fields))
}

fn alone(handle: u64, action: Action) -> FileRequest {
    let other = None;
    FileRequest {
        handle,
        other,
        action,
    }
}

fn read(fields: &[u8]) -> Result<FileRequest, Invalid> {
    let Transfer {
        handle,
        offset,
        size,
        ..
    } = Transfer::decode(fields)?;
    Ok(alone(handle, Action::Read { offset, size }))
}

fn write(fields: &[u8]) -> Result<FileRequest, Invalid> {
    let transfer = Transfer::decode(fields)?;
    let action = Action::Write {
        offset: transfer.offset,
        size: transfer.size,
        // A page that the guest writes back has its place; what it writes now goes to the end.
        append: transfer.flags & libc::O_APPEND as u32 != 0
            && transfer.kind_flags & Transfer::WRITE_CACHE == 0,
    };
    Ok(alone(transfer.handle, action))
}

fn sync(fields: &[u8]) -> Result<FileRequest, Invalid> {
    let mut input = Input::new(fields);
    let (handle, flags) = (input.u64()?, input.u32()?);
    let only_data = flags & 1 != 0;
    Ok(alone(handle, Action::Sync { only_data }))
}

fn allocate(fields: &[u8]) -> Result<FileRequest, Invalid> {
    let mut input = Input::new(fields);
    let (handle, offset, len) = (input.u64()?, input.u64()?, input.u64()?);
    let mode = input.u32()?;
    Ok(alone(handle, Action::Allocate { mode, offset, len }))
}

fn seek(fields: &[u8]) -> Result<FileRequest, Invalid> {
    let mut input = Input::new(fields);
    let (handle, offset, whence) = (input.u64()?, input.u64()?, input.u32()?);
    Ok(alone(handle, Action::Seek { offset, whence }))
}

fn copy(fields: &[u8]) -> Result<FileRequest, Invalid> {
    let mut input = Input::new(fields);
    let (handle, from) = (input.u64()?, input.u64()?);
    let (_node, other, to) = (input.u64()?, input.u64()?, input.u64()?);
    let (len, flags) = (input.u64()?, input.u64()?);
    if flags != 0 {
        return Err(Invalid);
    }
    Ok(FileRequest {
        handle,
        other: Some(other),
        action: Action::Copy { from, to, len },
    })
}

/// A part of the guest's RAM that a request reads or writes, as the address that the host's kernel
/// takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct RamSlice {
    pub(super) address: *mut u8,
    pub(super) len: usize,
}

// SAFETY: the address is of guest RAM, which every thread may access; the device keeps the RAM mapped
// until all requests are done (`Fs::drain`).
unsafe impl Send for RamSlice {}

/// The parts of a chain that a read fills or a write takes: all behind the headers, and no more than
/// `size` bytes.
pub(super) fn data(chain: &DescriptorChain<'_>, action: Action) -> Option<Vec<RamSlice>> {
    let slices = |segments: &mut dyn Iterator<Item = crate::virtio::chain::Segment<'_>>| {
        segments
            .map(|segment| RamSlice {
                address: segment.slice.ptr_guard_mut().as_ptr(),
                len: segment.slice.len(),
            })
            .collect()
    };
    match action {
        Action::Read { size, .. } => {
            let (_, room) = chain.writer().split_at(OUT_HEADER).ok()?;
            let len = room.remaining().min(size as usize);
            let (room, _) = room.split_at(len).ok()?;
            Some(slices(&mut room.segments()))
        }
        Action::Write { size, .. } => {
            let mut reader = chain.reader();
            reader.read_array::<IN_HEADER>().ok()?;
            reader.read_array::<{ Transfer::BYTES }>().ok()?;
            let data = reader.take(size as usize).ok()?;
            Some(slices(&mut data.segments()))
        }
        _ => Some(Vec::new()),
    }
}

/// An open regular file.
pub(super) type SharedFile = Arc<std::fs::File>;
