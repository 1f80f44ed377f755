//! Streams between host and guest: virtio-vsock (VIRTIO 1.3, 5.10), served in user space.
//!
//! **From the host**: connect to the VM's Unix socket, write `CONNECT <port>\n`, read
//! `OK <host port>\n`, and the stream is the guest's. A refusal closes the socket without a word.
//! **From the guest**: by default every connection is refused; a [`GuestConnector`] lets them
//! through. Context ids lead nowhere but to this VM's own socket, so every guest may have the same.
//!
//! **Save and restore**: connections belong to processes of the host and end where a guest is
//! restored. Its driver is told at once (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`), and hosts are let
//! in only when it has heard: else the driver might take a new connection for an old one and
//! reset it. A pause, on the other hand, ends nothing and stops the clock of every timeout.
//!
//! `connection` is one stream; `mux` all of them; `queue` moves packets; this file is the device.

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

/// How long a restored guest may take to hear that its connections are gone before hosts are let
/// in all the same: its driver may be one that looks at no events. Long, because a driver that is
/// only slow, on a busy host, takes the connections of those who were let in for old ones.
const RESET_TIMEOUT: Duration = Duration::from_secs(5);

/// What one device may use of the host.
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

/// What a vsock device is built on.
pub struct VsockResources {
    /// The VM's Unix socket, bound and listening.
    pub listener: UnixListener,
    /// Where the guest's own connections go; `None` refuses them all.
    pub connector: Option<Box<dyn GuestConnector>>,
    /// Bounds and timeouts.
    pub limits: VsockLimits,
}

impl VsockResources {
    /// Only hosts connect, with the usual limits.
    pub fn new(listener: UnixListener) -> Self {
        Self {
            listener,
            connector: None,
            limits: VsockLimits::default(),
        }
    }
}

/// How far a restored guest is in learning that its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TransportReset {
    /// It need not know, or does: hosts are let in.
    Done,
    /// The event waits for a buffer.
    Pending,
    /// The event is under way: the driver moves on from this position when it has dealt with it.
    /// Hosts are let in before that only when it took too long.
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
    /// Builds the device from its state, [`VsockState::fresh`] or a decoded one.
    ///
    /// Makes a timer; all else that it needs of the host is in `resources`.
    pub fn new(resources: VsockResources, state: VsockState) -> Result<Self, DeviceError> {
        state.check()?;
        let mux = Mux::new(resources, state.guest_cid, state.next_host_port)
            .map_err(DEVICE.host_error("set up its listener and timer"))?;
        Ok(Self {
            mux,
            reset: if state.transport_reset {
                TransportReset::Pending
            } else {
                TransportReset::Done
            },
            queues: None,
        })
    }

    /// Connections at present, those that are still being opened or closed included.
    pub fn connections(&self) -> usize {
        self.mux.connections()
    }

    /// Works off everything there is to do.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = &mut self.queues else {
            return Ok(());
        };
        queues.serve(&mut self.mux)?;
        self.mux.arm().map_err(DEVICE.host_error("arm its timer"))
    }

    /// A broken device is not called any more: its sockets must not wake the loop for nothing,
    /// nor keep hosts waiting.
    fn stop_if_broken(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if result.is_err() {
            self.stop();
        }
        result
    }

    fn stop(&mut self) {
        if let Err(error) = self.mux.stop() {
            tracing::error!(%error, "vsock: cannot leave the event loop");
        }
    }

    /// Brings the announcement of a reset forward as far as the driver allows.
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
                // The driver has closed what was opened meanwhile, and sends nothing of that: the
                // hosts would wait for ever.
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
        // A new driver has no old connections to hear of.
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
}
