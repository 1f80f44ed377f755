//! Streams between host and guest: virtio-vsock (VIRTIO 1.3, 5.10), served in user space.
//!
//! **From the host**: connect to the VM's Unix socket, write `CONNECT <port>\n`, read `OK <host
//! port>\n`, and the stream is the guest's. A refusal closes the socket without an answer.
//! **From the guest**: by default every connection is refused; a [`GuestConnector`] allows them. A
//! context id only leads to this VM's own socket, so every guest may have the same.
//!
//! **Save and restore**: connections belong to processes of the host and end where a guest is
//! restored. Its driver is told at once (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`), and hosts are
//! admitted only after the driver has handled this: otherwise it might take a new connection for an
//! old one and reset it. A pause ends no connection, and stops the clock of every timeout.
//!
//! `connection` is one stream, `mux` has all of them, `queue` moves packets, and this file is the
//! device.

mod backend;
mod connection;
mod deadlines;
mod mux;
mod packet;
mod queue;
mod state;
mod table;
#[cfg(test)]
mod tests;

pub use backend::{GuestConnector, PathConnector};
pub use state::{SavedVsock, VsockState};

use std::os::unix::net::UnixListener;
use std::time::Duration;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

use self::mux::{Mux, TOKEN_LISTENER, TOKEN_TIMER};
use self::queue::Queues;
use crate::virtio::{Activation, DeviceError, DeviceName, ServedQueue, VirtioDevice};

/// The name that errors give the device.
const DEVICE: DeviceName = DeviceName::new("vsock");

/// `VIRTIO_VSOCK_F_STREAM`: stream sockets are supported.
const F_STREAM: u64 = 1 << 0;

const QUEUE_SIZE: u16 = 256;
const QUEUES: u16 = 3;
const EVENT_QUEUE: u16 = 2;

/// The time after which hosts are admitted although a restored guest has not handled the loss of
/// its connections, as its driver may not look at events at all. It is long, because a driver that
/// is only slow, on a busy host, takes connections that are admitted early for old ones.
const RESET_TIMEOUT: Duration = Duration::from_secs(5);

/// Limits on the host's resources that one device may use.
#[derive(Clone, Debug)]
pub struct VsockLimits {
    /// Connections at a time, a file descriptor each; at most 65,536.
    pub max_connections: usize,
    /// Bytes that all connections together may buffer for hosts that read slowly. Allocated only
    /// when that happens. Each connection gets 4 KiB at least, 256 KiB at most.
    pub max_buffered_bytes: u64,
    /// How long a host may take to name the port it wants.
    pub greeting_timeout: Duration,
    /// How long the guest may take to answer a connection request.
    pub connect_timeout: Duration,
    /// How long the guest may take to confirm that both directions ended.
    pub close_timeout: Duration,
}

impl Default for VsockLimits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_buffered_bytes: 32 << 20,
            greeting_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(20),
            close_timeout: Duration::from_secs(8),
        }
    }
}

/// The host's resources of a vsock device.
pub struct VsockResources {
    /// The VM's Unix socket, bound and listening.
    pub listener: UnixListener,
    /// Connects the guest's own streams; `None` refuses them all.
    pub connector: Option<Box<dyn GuestConnector>>,
    /// Bounds and timeouts.
    pub limits: VsockLimits,
}

impl VsockResources {
    /// Resources with which only hosts may connect, with the usual limits.
    pub fn new(listener: UnixListener) -> Self {
        Self {
            listener,
            connector: None,
            limits: VsockLimits::default(),
        }
    }
}

/// The progress of telling a restored guest that its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TransportReset {
    /// The guest knows, or need not know. Hosts are admitted.
    Done,
    /// The event waits for a buffer of the driver.
    Pending,
    /// The event was sent. The driver's position in the queue changes when it has handled the
    /// event. Hosts are admitted before that only when it is overdue.
    Announced { position: u16, overdue: bool },
}

impl TransportReset {
    fn admits_hosts(self) -> bool {
        matches!(self, Self::Done | Self::Announced { overdue: true, .. })
    }
}

/// The vsock device.
pub struct Vsock {
    mux: Mux,
    reset: TransportReset,
    queues: Option<Queues>,
}

impl Vsock {
    /// Builds the device of a guest with this context id.
    ///
    /// This makes a timer. All other resources of the host are in `resources`.
    pub fn new(resources: VsockResources, guest_cid: u64) -> Result<Self, DeviceError> {
        let state = VsockState::fresh(guest_cid);
        state.check()?;
        let mux = Mux::new(resources, state.guest_cid, state.next_host_port)
            .map_err(DEVICE.host_error("set up its listener and timer"))?;
        Ok(Self {
            mux,
            reset: TransportReset::Done,
            queues: None,
        })
    }

    /// The number of connections, including those that are being opened or closed.
    pub fn connections(&self) -> usize {
        self.mux.connections()
    }

    /// Moves all packets that are waiting.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = &mut self.queues else {
            return Ok(());
        };
        queues.serve(&mut self.mux)?;
        self.mux.arm().map_err(DEVICE.host_error("arm its timer"))
    }

    /// Stops a device that is broken and will not be called any more: its sockets must neither keep
    /// the event loop busy nor keep hosts waiting.
    fn stop_if_broken(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if result.is_err() {
            self.stop();
        }
        result
    }

    fn stop(&mut self) {
        if let Err(error) = self.mux.stop() {
            tracing::error!(%error, "vsock: cannot be unregistered from the event loop");
        }
    }

    /// Continues the announcement of a reset as far as the driver allows.
    fn announce(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = &mut self.queues else {
            return Ok(());
        };
        if self.reset == TransportReset::Pending
            && let Some(position) = queues.announce_reset()?
        {
            self.reset = TransportReset::Announced {
                position,
                overdue: false,
            };
        }
        if let TransportReset::Announced { position, overdue } = self.reset
            && queues.passed(position)?
        {
            if overdue {
                // The driver has closed the connections that were opened meanwhile without a
                // packet, so their hosts would wait for ever.
                self.mux.end_all();
            }
            self.reset = TransportReset::Done;
        }
        self.mux
            .listen(self.reset.admits_hosts())
            .map_err(DEVICE.host_error("wait for its listener"))
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> DeviceName {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(QUEUES)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_bytes(&self.mux.guest_cid().to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let event_idx = activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut rings = activation
            .queues
            .into_iter()
            .map(|queue| ServedQueue::new(DEVICE, queue, event_idx));
        let (Some(rx), Some(tx), Some(event), None) =
            (rings.next(), rings.next(), rings.next(), rings.next())
        else {
            return Err(DEVICE.driver_error(format!("it did not set up all {QUEUES} queues")));
        };
        self.mux
            .start(activation.events)
            .map_err(DEVICE.host_error("wait for its timer"))?;
        self.queues = Some(Queues {
            ram: activation.ram,
            rx,
            tx,
            event,
            interrupt: activation.interrupt,
        });
        if self.reset != TransportReset::Done {
            self.mux.listen_within(RESET_TIMEOUT);
        }
        let result = self.announce().and_then(|()| self.serve());
        self.stop_if_broken(result)
    }

    fn notify_queue(&mut self, queue: u16) -> Result<(), DeviceError> {
        let announced = if queue == EVENT_QUEUE && self.reset != TransportReset::Done {
            self.announce()
        } else {
            Ok(())
        };
        let result = announced.and_then(|()| self.serve());
        self.stop_if_broken(result)
    }

    fn handle_event(&mut self, token: u32, ready: EventSet) -> Result<(), DeviceError> {
        let result = match token {
            TOKEN_LISTENER => self.mux.accept(),
            TOKEN_TIMER => self.mux.timer_ready().map(|opened| {
                if let TransportReset::Announced { overdue, .. } = &mut self.reset {
                    *overdue |= opened;
                }
            }),
            connection => {
                self.mux.socket_ready(connection, ready);
                Ok(())
            }
        };
        let result = result
            .map_err(DEVICE.host_error("wait on its sockets"))
            .and_then(|()| self.serve());
        self.stop_if_broken(result)
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Every call leaves queues and RAM at rest, so there is nothing to drain.
        let stopped = self.mux.listen(false).and_then(|()| self.mux.pause());
        stopped.map_err(DEVICE.host_error("stop its listener and timer"))
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.mux.resume();
        let result = self.announce().and_then(|()| self.serve());
        self.stop_if_broken(result)
    }

    fn reset(&mut self) {
        self.queues = None;
        // A new driver has no old connections that it must be told of.
        self.reset = TransportReset::Done;
        self.stop();
    }

    fn queues(&self) -> Vec<(u16, &Queue)> {
        match &self.queues {
            Some(queues) => vec![
                queues.rx.indexed(),
                queues.tx.indexed(),
                queues.event.indexed(),
            ],
            None => Vec::new(),
        }
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        VsockState {
            guest_cid: self.mux.guest_cid(),
            next_host_port: self.mux.next_host_port(),
            transport_reset: self.queues.is_some() || self.reset != TransportReset::Done,
        }
        .encode()
    }

    fn check_state(&self, state: &[u8]) -> Result<u64, DeviceError> {
        VsockState::decode(state).map(|_fits| self.features())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let state = VsockState::decode(state)?;
        self.mux.restore(state.guest_cid, state.next_host_port);
        self.reset = match state.transport_reset {
            true => TransportReset::Pending,
            false => TransportReset::Done,
        };
        Ok(())
    }
}
