//! What becomes of a request that the guest makes: an answer at once, a message to the server, or work
//! on an open file.

use std::time::Instant;

use clone_fuse::link::Kind;
use clone_fuse::wire::{ENTRY_BYTES, InHeader, OUT_HEADER, op, out_header};
use rustix::io::Errno;

use super::backend::Backend;
use super::in_flight::{Pending, Work};
use super::queue::{self, FuseRequest};
use super::session::Session;
use crate::virtio::{DescriptorChain, DeviceError, RequestHandler, Served, ServedQueue};

/// The most messages that wait for the server to take them.
const MAX_QUEUED: usize = 64;
/// The most requests that the server and the workers have.
const MAX_IN_FLIGHT: usize = 576;

/// Passes the requests of one queue on.
pub(super) struct Submission<'a> {
    pub(super) slot: usize,
    pub(super) session: &'a mut Session,
}

impl<'m> RequestHandler<'m> for Submission<'_> {
    fn handle(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<Served, DeviceError> {
        let (header, request) = queue::parse(queue, chain)?;
        let bytes = (chain.readable_len() + chain.writable_len()) as u64;
        match request {
            FuseRequest::Nothing => Ok(Served::Used { written: 0, bytes }),
            FuseRequest::Answer(error) => refuse(queue, chain, header, error),
            FuseRequest::Server(message) => self.ask(queue, chain, header, message),
            FuseRequest::File(request) => {
                let Some(data) = queue::data(chain, request.action) else {
                    return refuse(queue, chain, header, Errno::INVAL);
                };
                let since = Instant::now();
                let work = Work::File {
                    since,
                    request,
                    data,
                    file: None,
                };
                // The content goes into the room behind this.
                let pending = self.pending(chain, header, work, 64);
                if self.session.backend.is_none() {
                    return refuse(queue, chain, header, Errno::IO);
                }
                let tag = self.session.new_tag();
                match self.session.advance(tag, pending) {
                    None => Ok(Served::Kept { bytes }),
                    Some((_, error)) => refuse(queue, chain, header, error),
                }
            }
        }
    }

    fn is_ready(&self) -> bool {
        let queued = self.session.backend.as_ref().map_or(0, Backend::queued);
        queued < MAX_QUEUED && self.session.pending.len() < MAX_IN_FLIGHT
    }
}

impl Submission<'_> {
    fn pending(
        &self,
        chain: &DescriptorChain<'_>,
        header: InHeader,
        work: Work,
        most: usize,
    ) -> Pending {
        let room = chain.writer();
        let len = room.remaining().min(most);
        let room = room.split_at(len).map(|(front, _)| {
            let segments = front.segments();
            segments.map(|it| (it.address, it.slice.len())).collect()
        });
        Pending {
            slot: self.slot,
            head: chain.head(),
            unique: header.unique,
            room: room.unwrap_or_default(),
            work,
        }
    }

    /// Has the server carry a request out.
    fn ask(
        &mut self,
        queue: &ServedQueue,
        chain: &DescriptorChain<'_>,
        header: InHeader,
        message: Vec<u8>,
    ) -> Result<Served, DeviceError> {
        let bytes = message.len() as u64;
        let is_answered = !matches!(header.opcode, op::FORGET | op::BATCH_FORGET);
        let tag = self.session.new_tag();
        let since = Instant::now();
        let opens = match header.opcode {
            op::OPEN => Some(0),
            // Behind the entry.
            op::CREATE | op::TMPFILE => Some(ENTRY_BYTES),
            _ => None,
        };
        let work = Work::Server { since, opens };
        let pending = self.pending(chain, header, work, usize::MAX);
        let Some(backend) = &mut self.session.backend else {
            return match is_answered {
                true => refuse(queue, chain, header, Errno::IO),
                false => Ok(Served::Used { written: 0, bytes }),
            };
        };
        if header.opcode == op::RELEASE
            && let Some(handle) = message.get(40..48).and_then(|it| it.try_into().ok())
        {
            self.session.files.remove(u64::from_le_bytes(handle));
        }
        if matches!(header.opcode, op::INIT | op::DESTROY) {
            // A new session begins, whose handles are others.
            self.session.files.clear();
        }
        backend.push(tag, Kind::Guest, message);
        if !is_answered {
            return Ok(Served::Used { written: 0, bytes });
        }
        self.session.arm_first()?;
        self.session.pending.insert(tag, pending);
        Ok(Served::Kept { bytes })
    }
}

/// Answers a request at once.
fn refuse(
    queue: &ServedQueue,
    chain: &DescriptorChain<'_>,
    header: InHeader,
    error: Errno,
) -> Result<Served, DeviceError> {
    let answer = out_header(header.unique, Some(error), 0);
    let put = chain.writer().write_all(&answer);
    put.map_err(|error| queue.driver_error(error))?;
    Ok(Served::Used {
        written: OUT_HEADER as u32,
        bytes: 0,
    })
}
