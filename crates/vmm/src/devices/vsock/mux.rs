//! All connections of a device: it assigns packets to connections, and keeps the order of turns and
//! the timeouts. It does not depend on queues: packets come in by [`Mux::receive`] and go out by
//! [`Mux::next_packet`].

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::backend::{self, Accepted, Greeting, GuestConnector};
use super::connection::{Connection, Outcome, Phase, Ports, Wait};
use super::deadlines::Deadlines;
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use super::table::Table;
use super::{VsockLimits, VsockResources};
use crate::event_loop::Registrar;
use crate::virtio::{Reader, Writer};

/// The listener's token.
pub(super) const TOKEN_LISTENER: u32 = 0;
/// The timer's token.
pub(super) const TOKEN_TIMER: u32 = 1;

/// The ports of the host's side are from this number to twice this number.
const HOST_PORTS: u32 = 1 << 30;
/// The number of resets that may wait for receive buffers before the guest's own packets have to
/// wait.
const MAX_REPLIES: usize = 256;
/// The number of connections that are accepted before other handlers have their turn.
const MAX_ACCEPTS: usize = 64;
/// The time for which no connection is accepted after the process ran out of file descriptors.
const RELISTEN_DELAY: Duration = Duration::from_millis(100);

/// All connections of a device; see the module.
pub(super) struct Mux {
    guest_cid: u64,
    next_host_port: u32,
    limits: VsockLimits,
    table: Table,
    /// The resets for packets of no connection, and of closed connections.
    replies: VecDeque<Header>,
    /// The connections that may have a packet, each once, in the order of their turns.
    ready: VecDeque<u32>,
    connector: Option<Box<dyn GuestConnector>>,
    listener: UnixListener,
    listening: bool,
    deadlines: Deadlines,
    events: Option<Registrar>,
    paused_at: Option<Instant>,
}

impl Mux {
    pub(super) fn new(
        resources: VsockResources,
        guest_cid: u64,
        next_host_port: u32,
    ) -> io::Result<Self> {
        let VsockResources {
            listener,
            connector,
            limits,
        } = resources;
        listener.set_nonblocking(true)?;
        Ok(Self {
            guest_cid,
            next_host_port: HOST_PORTS | next_host_port & (HOST_PORTS - 1),
            table: Table::new(limits.max_connections, limits.max_buffered_bytes),
            limits,
            replies: VecDeque::new(),
            ready: VecDeque::new(),
            connector,
            listener,
            listening: false,
            deadlines: Deadlines::new()?,
            events: None,
            paused_at: None,
        })
    }

    /// Takes over a saved context id and port, while stopped. A port that this device has given
    /// away since is not given again: in a guest that is put back, packets of its connections from
    /// then could be taken for a new connection's.
    pub(super) fn restore(&mut self, guest_cid: u64, next_host_port: u32) {
        self.guest_cid = guest_cid;
        let saved = HOST_PORTS | next_host_port & (HOST_PORTS - 1);
        self.next_host_port = self.next_host_port.max(saved);
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    pub(super) fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    pub(super) fn connections(&self) -> usize {
        self.table.len()
    }

    /// Registers the timer. The listener is registered by [`Mux::listen`].
    pub(super) fn start(&mut self, events: Registrar) -> io::Result<()> {
        events.add(self.deadlines.timer(), TOKEN_TIMER, EventSet::IN)?;
        self.events = Some(events);
        self.paused_at = None;
        Ok(())
    }

    /// Closes every connection and unregisters from the event loop.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        let unlistened = self.listen(false);
        self.end_all();
        self.replies.clear();
        self.ready.clear();
        self.deadlines.clear();
        self.paused_at = None;
        if let Some(events) = self.events.take() {
            events.remove(self.deadlines.timer())?;
        }
        unlistened
    }

    /// Closes every connection. Their hosts see the end of the stream.
    pub(super) fn end_all(&mut self) {
        for token in self.table.tokens() {
            self.remove(token);
        }
    }

    /// Starts or stops accepting hosts. Hosts that connect meanwhile wait in the listener's
    /// backlog.
    pub(super) fn listen(&mut self, on: bool) -> io::Result<()> {
        let Some(events) = &self.events else {
            return Ok(());
        };
        match (self.listening, on) {
            (false, true) => events.add(&self.listener, TOKEN_LISTENER, EventSet::IN)?,
            (true, false) => events.remove(&self.listener)?,
            _ => {}
        }
        self.listening = on;
        Ok(())
    }

    /// Starts accepting hosts after `timeout` at the latest.
    pub(super) fn listen_within(&mut self, timeout: Duration) {
        self.deadlines.add(Instant::now() + timeout, TOKEN_LISTENER);
    }

    /// Stops the clock of all deadlines.
    pub(super) fn pause(&mut self) -> io::Result<()> {
        self.paused_at = Some(Instant::now());
        self.deadlines.disarm()
    }

    /// Restarts the clock: moves all deadlines by the length of the pause.
    pub(super) fn resume(&mut self) {
        if let Some(since) = self.paused_at.take() {
            let paused = since.elapsed();
            self.deadlines.delay(paused);
            for token in self.table.tokens() {
                if let Some(member) = self.table.get_mut(token)
                    && let Some((_, at)) = &mut member.deadline
                {
                    *at += paused;
                }
            }
        }
        for token in self.table.tokens() {
            self.advance(token);
        }
    }

    /// Accepts the hosts that wait.
    pub(super) fn accept(&mut self) -> io::Result<()> {
        for _ in 0..MAX_ACCEPTS {
            match backend::accept(&self.listener)? {
                Accepted::NoConnection => break,
                Accepted::NoDescriptors => {
                    tracing::warn!("vsock: no file descriptors left for new connections");
                    self.listen(false)?;
                    self.deadlines
                        .add(Instant::now() + RELISTEN_DELAY, TOKEN_LISTENER);
                    break;
                }
                Accepted::Stream(stream) => match self.table.next_grant() {
                    Some(grant) => {
                        let token = self.table.insert(Connection::from_host(stream, grant));
                        self.register(token);
                    }
                    None => tracing::warn!(
                        limit = self.limits.max_connections,
                        "vsock: refused a connection, too many are open"
                    ),
                },
            }
        }
        Ok(())
    }

    /// A connection's socket is ready.
    pub(super) fn socket_ready(&mut self, token: u32, ready: EventSet) {
        if let Some(member) = self.table.get_mut(token) {
            member.connection.note_ready(ready);
            self.advance(token);
        }
    }

    /// Acts on deadlines that have passed. Returns `true` if hosts are accepted from now on.
    pub(super) fn timer_ready(&mut self) -> io::Result<bool> {
        let mut opened = false;
        for token in self.deadlines.take_due(Instant::now())? {
            if token == TOKEN_LISTENER {
                self.listen(true)?;
                opened = true;
            } else if let Some(member) = self.table.get_mut(token) {
                let waited = member.deadline.take();
                tracing::debug!(?waited, ports = ?member.connection.ports, "vsock: timed out");
                self.settle(token, Outcome::Reset);
            }
        }
        Ok(opened)
    }

    /// Sets the timer for the next deadline. It is called at the end of every event.
    pub(super) fn arm(&mut self) -> io::Result<()> {
        self.deadlines.arm(Instant::now())
    }

    /// Whether the guest's packets must wait because too many answers to them are waiting.
    pub(super) fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// Handles a packet of the guest. `payload` has exactly its data.
    pub(super) fn receive(&mut self, header: &Header, payload: Reader<'_, '_>) {
        if header.src_cid != self.guest_cid {
            // There is no receiver for an answer (5.10.6.4: a driver uses its own context id).
            tracing::debug!(?header, "vsock: packet from another context id dropped");
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let known = if header.dst_cid == HOST_CID && header.socket_type == TYPE_STREAM {
            self.table.find(ports)
        } else {
            None
        };
        if let Some(token) = known {
            if let Some(member) = self.table.get_mut(token) {
                let outcome = member.connection.receive(header, payload);
                self.settle(token, outcome);
            }
        } else if header.op == op::REQUEST
            && header.dst_cid == HOST_CID
            && header.socket_type == TYPE_STREAM
        {
            self.guest_connects(ports, header);
        } else if header.op != op::RST {
            self.replies.push_back(header.reset());
        }
    }

    fn guest_connects(&mut self, ports: Ports, request: &Header) {
        let grant = self.table.next_grant();
        let (Some(connector), Some(grant)) = (&mut self.connector, grant) else {
            self.replies.push_back(request.reset());
            return;
        };
        match connector.connect(ports.host) {
            Ok(stream) => {
                let connection = Connection::from_guest(stream, grant, request);
                let token = self.table.insert(connection);
                self.table.bind(token, ports);
                self.register(token);
            }
            Err(error) => {
                tracing::debug!(port = ports.host, %error, "vsock: the guest's connection is refused");
                self.replies.push_back(request.reset());
            }
        }
    }

    /// Whether [`Mux::next_packet`] may return a packet.
    pub(super) fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, with its data in `room`.
    pub(super) fn next_packet(&mut self, room: &Writer<'_, '_>) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(member) = self.table.get_mut(token) else {
                continue;
            };
            member.connection.queued = false;
            let packet = member.connection.next_packet(room);
            self.settle(token, Outcome::Keep);
            if let Some(packet) = packet {
                return Some(Header {
                    src_cid: HOST_CID,
                    dst_cid: self.guest_cid,
                    socket_type: TYPE_STREAM,
                    ..packet
                });
            }
        }
        None
    }

    /// Registers a new connection's socket. It is edge-triggered, because a socket whose data the
    /// guest has no room for must not keep the event loop busy.
    fn register(&mut self, token: u32) {
        let interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let (Some(member), Some(events)) = (self.table.get_mut(token), &self.events) else {
            return;
        };
        let outcome = match events.add(&member.connection.stream, token, interest) {
            Ok(()) => Outcome::Keep,
            Err(error) => {
                tracing::warn!(%error, "vsock: cannot wait for a connection");
                Outcome::Reset
            }
        };
        self.settle(token, outcome);
    }

    fn advance(&mut self, token: u32) {
        let Some(member) = self.table.get_mut(token) else {
            return;
        };
        let mut outcome = member.connection.advance();
        if outcome == Outcome::Keep && member.connection.phase == Phase::Greeting {
            outcome = match backend::read_greeting(&member.connection.stream) {
                Greeting::Incomplete => Outcome::Keep,
                Greeting::Bad => Outcome::Close,
                Greeting::Port(port) => self.host_connects(token, port),
            };
        }
        self.settle(token, outcome);
    }

    fn host_connects(&mut self, token: u32, guest: u32) -> Outcome {
        // At most one port per connection is taken, so the loop ends.
        let ports = loop {
            let host = self.next_host_port;
            self.next_host_port = HOST_PORTS | host.wrapping_add(1) & (HOST_PORTS - 1);
            let ports = Ports { host, guest };
            if self.table.bind(token, ports) {
                break ports;
            }
        };
        if let Some(member) = self.table.get_mut(token) {
            member.connection.request(ports);
        }
        Outcome::Keep
    }

    /// Updates the queue, the registration and the deadline of a connection after it has changed.
    fn settle(&mut self, token: u32, outcome: Outcome) {
        let Some(member) = self.table.get_mut(token) else {
            return;
        };
        let connection = &mut member.connection;
        if outcome != Outcome::Keep {
            if outcome == Outcome::Reset && connection.is_known_to_guest() {
                self.replies
                    .push_back(reset(self.guest_cid, connection.ports));
            }
            if !connection.is_draining() {
                self.remove(token);
                return;
            }
            let ports = connection.ports;
            self.table.unbind(token, ports);
        }
        self.queue_and_register(token);
        self.set_deadline(token);
    }

    fn queue_and_register(&mut self, token: u32) {
        let (Some(member), Some(events)) = (self.table.get_mut(token), &self.events) else {
            return;
        };
        let connection = &mut member.connection;
        if !connection.queued && connection.has_packet() {
            connection.queued = true;
            self.ready.push_back(token);
        }
        let wants_room = connection.wants_room();
        if wants_room != connection.awaits_room {
            let mut interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            interest.set(EventSet::OUT, wants_room);
            match events.modify(&connection.stream, token, interest) {
                Ok(()) => connection.awaits_room = wants_room,
                Err(error) => {
                    tracing::warn!(%error, "vsock: cannot wait for a connection");
                    if connection.is_known_to_guest() && connection.phase != Phase::Draining {
                        self.replies
                            .push_back(reset(self.guest_cid, connection.ports));
                    }
                    self.remove(token);
                }
            }
        }
    }

    fn set_deadline(&mut self, token: u32) {
        let Some(member) = self.table.get_mut(token) else {
            return;
        };
        let wait = member.connection.waits_for();
        if member.deadline.map(|(wait, _)| wait) == wait {
            return;
        }
        if let Some((_, at)) = member.deadline.take() {
            self.deadlines.remove(at, token);
        }
        if let Some(wait) = wait {
            let timeout = match wait {
                Wait::Greeting => self.limits.greeting_timeout,
                Wait::Response => self.limits.connect_timeout,
                Wait::Close => self.limits.close_timeout,
            };
            let at = Instant::now() + timeout;
            member.deadline = Some((wait, at));
            self.deadlines.add(at, token);
        }
    }

    fn remove(&mut self, token: u32) {
        let Some(member) = self.table.remove(token) else {
            return;
        };
        if let Some((_, at)) = member.deadline {
            self.deadlines.remove(at, token);
        }
        if let Some(events) = &self.events {
            // Closing the socket, which follows, unregisters it as well.
            let _ = events.remove(&member.connection.stream);
        }
    }
}

/// The reset that ends the connection between `ports`.
fn reset(guest_cid: u64, ports: Ports) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: ports.host,
        dst_port: ports.guest,
        socket_type: TYPE_STREAM,
        op: op::RST,
        ..Header::default()
    }
}
