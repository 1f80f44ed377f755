//! One stream between a Unix socket of the host and a socket of the guest: its phases, credit in
//! both directions (VIRTIO 1.3, 5.10.6.3) and the end of each direction (5.10.6.4).
//!
//! Data moves directly between the socket and guest memory. Only data that the host's socket does
//! not take at once is buffered, and never more than the guest's credit. `mux` keeps the ports, the
//! order of turns and the timeouts.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};
use vmm_sys_util::epoll::EventSet;

use super::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::virtio::{Reader, Writer};

/// The two ports that identify a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// The phase of a connection's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host has connected, and the port that it wants is not known yet.
    Greeting,
    /// The connection waits for the guest's answer.
    Connecting,
    /// Both sides may send.
    Established,
    /// The guest has closed the connection, and some of its data has not reached the host's socket
    /// yet.
    Draining,
}

/// The consequence of an event for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The connection stays open.
    Keep,
    /// The connection is closed, and the guest knows this or never knew the connection.
    Close,
    /// The connection is closed, and the guest must be told.
    Reset,
}

/// What a connection waits for with a timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// The host's line that names the port.
    Greeting,
    /// The guest's answer to a request.
    Response,
    /// The guest's reset after both directions were ended.
    Close,
}

/// A connection. `ports` are meaningful from [`Phase::Connecting`] on.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) phase: Phase,
    pub(super) ports: Ports,
    /// Whether the connection is in the queue of those that have something for the guest.
    pub(super) queued: bool,
    /// Whether the event loop waits for room to write in the socket.
    pub(super) awaits_room: bool,

    // These fields are for data from the host to the guest.
    /// The socket may have data: no read has shown otherwise yet.
    readable: bool,
    /// The socket's data has been read to its end.
    ended: bool,
    /// The host has closed its socket, and will neither send nor receive.
    hung_up: bool,
    peer_buf_alloc: u32,
    peer_fwd_cnt: Wrapping<u32>,
    sent: Wrapping<u32>,

    // These fields are for data from the guest to the host.
    buffer: VecDeque<u8>,
    buf_alloc: u32,
    forwarded: Wrapping<u32>,
    /// The value of `forwarded` that was last sent to the guest.
    forwarded_reported: Wrapping<u32>,
    /// The directions that the guest has ended.
    guest_shutdown: u32,
    /// Whether the host's socket was shut down for writing.
    write_ended: bool,

    // These fields are for packets that the guest has yet to get.
    pending_opening: Option<u16>,
    pending_credit: bool,
    pending_shutdown: u32,
    sent_shutdown: u32,
}

impl Connection {
    /// A stream that the host opened; `buf_alloc` bytes may be buffered for it.
    pub(super) fn from_host(stream: UnixStream, buf_alloc: u32) -> Self {
        Self {
            stream,
            phase: Phase::Greeting,
            ports: Ports::default(),
            queued: false,
            awaits_room: false,
            readable: false,
            ended: false,
            hung_up: false,
            peer_buf_alloc: 0,
            peer_fwd_cnt: Wrapping(0),
            sent: Wrapping(0),
            buffer: VecDeque::new(),
            buf_alloc,
            forwarded: Wrapping(0),
            forwarded_reported: Wrapping(0),
            guest_shutdown: 0,
            write_ended: false,
            pending_opening: None,
            pending_credit: false,
            pending_shutdown: 0,
            sent_shutdown: 0,
        }
    }

    /// A stream that answers the guest's `request`.
    pub(super) fn from_guest(stream: UnixStream, buf_alloc: u32, request: &Header) -> Self {
        let mut connection = Self::from_host(stream, buf_alloc);
        connection.ports = Ports {
            host: request.dst_port,
            guest: request.src_port,
        };
        connection.phase = Phase::Established;
        connection.pending_opening = Some(op::RESPONSE);
        connection.update_credit(request);
        connection
    }

    /// The host has named the port that it wants: a request must be sent to the guest.
    pub(super) fn request(&mut self, ports: Ports) {
        self.ports = ports;
        self.phase = Phase::Connecting;
        self.pending_opening = Some(op::REQUEST);
        // Data may have come with the port.
        self.readable = true;
    }

    /// The size of the buffer that the connection was granted, in bytes.
    pub(super) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Whether data that the guest sent before it closed the connection has yet to reach the host.
    pub(super) fn is_draining(&self) -> bool {
        self.phase == Phase::Draining && !self.buffer.is_empty() && !self.hung_up
    }

    /// Whether the guest knows of the connection.
    pub(super) fn is_known_to_guest(&self) -> bool {
        self.phase != Phase::Greeting && self.pending_opening != Some(op::REQUEST)
    }

    /// Whether data waits for room in the host's socket.
    pub(super) fn wants_room(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// What the connection waits for with a timeout.
    pub(super) fn waits_for(&self) -> Option<Wait> {
        match self.phase {
            Phase::Greeting => Some(Wait::Greeting),
            Phase::Connecting => Some(Wait::Response),
            Phase::Established => (self.sent_shutdown == SHUTDOWN_BOTH).then_some(Wait::Close),
            Phase::Draining => None,
        }
    }

    /// Notes what the host's socket is ready for, and changes nothing else.
    pub(super) fn note_ready(&mut self, ready: EventSet) {
        if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
        }
        if ready != EventSet::OUT {
            self.readable = true;
        }
    }

    /// Acts on what was noted: flushes the buffer, and checks whether the host is gone.
    pub(super) fn advance(&mut self) -> Outcome {
        self.flush();
        match self.phase {
            Phase::Greeting if self.hung_up => Outcome::Close,
            Phase::Connecting if self.hung_up => match self.pending_opening {
                Some(_) => Outcome::Close,
                None => Outcome::Reset,
            },
            Phase::Draining if self.hung_up || self.buffer.is_empty() => Outcome::Close,
            _ => {
                if self.hung_up && (self.ended || self.guest_shutdown & SHUTDOWN_RECEIVE != 0) {
                    self.pending_shutdown = SHUTDOWN_BOTH;
                }
                Outcome::Keep
            }
        }
    }

    /// Handles a packet of the guest. `payload` has exactly `header.len` bytes for `RW`.
    pub(super) fn receive(&mut self, header: &Header, payload: Reader<'_, '_>) -> Outcome {
        self.update_credit(header);
        match (self.phase, header.op) {
            (_, op::RST) => self.close_by_guest(Outcome::Close),
            (Phase::Connecting, op::RESPONSE) if self.pending_opening.is_none() => {
                self.established()
            }
            (Phase::Established, op::RW) => self.data(header.len, payload),
            (Phase::Established, op::SHUTDOWN) => self.shutdown(header.flags),
            (Phase::Established, op::CREDIT_UPDATE) => Outcome::Keep,
            (Phase::Established, op::CREDIT_REQUEST) => {
                self.pending_credit = true;
                Outcome::Keep
            }
            _ => Outcome::Reset,
        }
    }

    fn update_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = Wrapping(header.fwd_cnt);
    }

    /// The bytes that the guest has room for. A guest that counts wrongly only harms itself.
    fn credit(&self) -> u32 {
        let in_flight = (self.sent - self.peer_fwd_cnt).0;
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    fn established(&mut self) -> Outcome {
        let line = format!("OK {}\n", self.ports.host);
        match self.stream.write(line.as_bytes()) {
            Ok(written) if written == line.len() => {
                self.phase = Phase::Established;
                self.advance()
            }
            // Nothing was written to the socket before, so it has room unless the host is gone.
            _ => Outcome::Reset,
        }
    }

    fn data(&mut self, len: u32, payload: Reader<'_, '_>) -> Outcome {
        let room = self.buf_alloc as usize - self.buffer.len();
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || len as usize > room {
            return Outcome::Reset;
        }
        for segment in payload.segments() {
            let mut rest = segment.slice;
            while !rest.is_empty() && self.buffer.is_empty() && !self.host_receives_no_more() {
                match retry(|| (&self.stream).write_volatile(&rest)) {
                    Ok(written) => {
                        self.forwarded += written as u32;
                        match rest.offset(written) {
                            Ok(left) => rest = left,
                            Err(_) => return Outcome::Reset,
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => self.drop_host_data(),
                }
            }
            if self.host_receives_no_more() {
                self.forwarded += rest.len() as u32;
            } else {
                let mut chunk = [0; 4096];
                for at in (0..rest.len()).step_by(chunk.len()) {
                    let Ok(left) = rest.offset(at) else {
                        return Outcome::Reset;
                    };
                    let copied = left.copy_to(&mut chunk);
                    self.buffer.extend(&chunk[..copied]);
                }
            }
        }
        Outcome::Keep
    }

    fn host_receives_no_more(&self) -> bool {
        (self.pending_shutdown | self.sent_shutdown) & SHUTDOWN_RECEIVE != 0
    }

    /// Drops the data that is left for the host after writing has failed for good, and tells the
    /// guest.
    fn drop_host_data(&mut self) {
        self.forwarded += self.buffer.len() as u32;
        self.buffer = VecDeque::new();
        self.pending_shutdown |= SHUTDOWN_RECEIVE;
    }

    fn shutdown(&mut self, flags: u32) -> Outcome {
        let new = flags & SHUTDOWN_BOTH & !self.guest_shutdown;
        self.guest_shutdown |= new;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            return self.close_by_guest(Outcome::Reset);
        }
        if new & SHUTDOWN_RECEIVE != 0 {
            // The host's next write fails, as it would on a socket of its own kind. An error means
            // that the host is gone already, which its socket reports as an event.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.advance()
    }

    /// The guest has closed the connection, and gets `answer`. Data that it sent before still goes
    /// to the host.
    fn close_by_guest(&mut self, answer: Outcome) -> Outcome {
        if self.phase == Phase::Established {
            self.flush();
            if !self.buffer.is_empty() {
                self.phase = Phase::Draining;
            }
        }
        answer
    }

    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            match (&self.stream).write(self.buffer.as_slices().0) {
                Ok(written) => {
                    self.buffer.drain(..written);
                    self.forwarded += written as u32;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.drop_host_data(),
            }
        }
        // Thousands of idle connections must not keep the memory of a busy moment.
        self.buffer = VecDeque::new();
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_ended {
            // This is done only once, as it makes its own socket ready. It fails only where the
            // host is gone.
            let _ = self.stream.shutdown(Shutdown::Write);
            self.write_ended = true;
        }
    }

    /// Whether the connection has, or may have, a packet for the guest now.
    pub(super) fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Greeting | Phase::Draining => false,
            Phase::Connecting => self.pending_opening.is_some(),
            Phase::Established => {
                self.pending_opening.is_some()
                    || self.new_shutdown() != 0
                    || self.can_read()
                    || self.credit_is_due()
            }
        }
    }

    fn new_shutdown(&self) -> u32 {
        self.pending_shutdown & !self.sent_shutdown
    }

    fn can_read(&self) -> bool {
        self.readable
            && !self.ended
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            && self.credit() > 0
    }

    fn credit_is_due(&self) -> bool {
        let untold = (self.forwarded - self.forwarded_reported).0;
        self.pending_credit
            || (untold >= self.buf_alloc / 2 && self.guest_shutdown & SHUTDOWN_SEND == 0)
    }

    /// The next packet for the guest. Data is read into `room`. Context ids are not filled in.
    pub(super) fn next_packet(&mut self, room: &Writer<'_, '_>) -> Option<Header> {
        if let Some(opening) = self.pending_opening.take() {
            return Some(self.header(opening));
        }
        if self.phase != Phase::Established {
            return None;
        }
        let mut len = 0;
        if self.new_shutdown() == 0 && self.can_read() {
            len = self.read(room);
        }
        if len > 0 {
            self.sent += len;
            return Some(Header {
                len,
                ..self.header(op::RW)
            });
        }
        if self.new_shutdown() != 0 {
            self.sent_shutdown |= self.pending_shutdown;
            return Some(Header {
                flags: self.sent_shutdown,
                ..self.header(op::SHUTDOWN)
            });
        }
        self.credit_is_due().then(|| self.header(op::CREDIT_UPDATE))
    }

    /// Reads as much as the guest has room and credit for. Returns 0 where there is no data.
    fn read(&mut self, room: &Writer<'_, '_>) -> u32 {
        let mut total = 0;
        for segment in room.segments() {
            let want = segment.slice.len().min((self.credit() - total) as usize);
            let Ok(mut target) = segment.slice.subslice(0, want) else {
                break;
            };
            if want == 0 {
                continue;
            }
            match retry(|| (&self.stream).read_volatile(&mut target)) {
                Ok(0) => self.end_of_host_data(),
                Ok(read) => {
                    total += read as u32;
                    if read == want {
                        continue;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(_) => {
                    self.hung_up = true;
                    self.end_of_host_data();
                }
            }
            break;
        }
        total
    }

    fn end_of_host_data(&mut self) {
        self.ended = true;
        self.pending_shutdown |= if self.hung_up {
            SHUTDOWN_BOTH
        } else {
            SHUTDOWN_SEND
        };
    }

    fn header(&mut self, op: u16) -> Header {
        self.pending_credit = false;
        self.forwarded_reported = self.forwarded;
        Header {
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded.0,
            ..Header::default()
        }
    }
}

/// Repeats a call that a signal interrupts.
fn retry(mut call: impl FnMut() -> Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    loop {
        match call() {
            Ok(count) => return Ok(count),
            Err(VolatileMemoryError::IOError(error)) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}
