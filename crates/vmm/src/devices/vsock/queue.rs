//! The three queues: packets for the guest, packets from it, and events (VIRTIO 1.3, 5.10.2).
//!
//! Work is bounded per call by [`BUDGET`]. Interrupts are raised once per call.

use std::sync::Arc;

use super::mux::Mux;
use super::packet::{HEADER_LEN, Header};
use crate::virtio::budget::Budget;
use crate::virtio::{
    DescriptorChain, DeviceError, GuestRam, Interrupt, RequestHandler, Served, ServedQueue,
    Stopped, Turn,
};

/// The packets in each direction that one call handles, and the bytes of their data.
const BUDGET: Budget = Budget::new(256, 8 << 20);

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone.
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The resources of the activation.
pub(super) struct Queues {
    pub(super) ram: GuestRam,
    pub(super) rx: ServedQueue,
    pub(super) tx: ServedQueue,
    pub(super) event: ServedQueue,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

impl Queues {
    /// Moves packets both ways until none is left, there is no room, or the budget is spent.
    pub(super) fn serve(&mut self, mux: &mut Mux) -> Result<(), DeviceError> {
        // Each direction has its own budget: a guest that floods one must not starve the other.
        let (mut tx_budget, mut rx_budget) = (BUDGET, BUDGET);
        loop {
            let mut turn = Turn::new(&mut tx_budget);
            let tx = self
                .tx
                .serve_silently(&self.ram, &mut turn, &mut FromGuest(mux))?;
            let rx = self.serve_rx(mux, &mut rx_budget)?;
            // A spent budget has requeued its queue. The guest's packets were all taken, or their
            // answers have no room: only answers that went out make room for more packets.
            if tx != Stopped::Blocked || matches!(rx, Stopped::Empty | Stopped::Budget) {
                break;
            }
        }
        self.tx.signal(&self.ram, &*self.interrupt)?;
        self.rx.signal(&self.ram, &*self.interrupt)
    }

    fn serve_rx(&mut self, mux: &mut Mux, budget: &mut Budget) -> Result<Stopped, DeviceError> {
        let mut turn = Turn::new(budget);
        self.rx
            .serve_silently(&self.ram, &mut turn, &mut ToGuest(mux))
    }

    /// Tells the guest that its connections are gone. Returns the driver's position in the event
    /// queue just before that, or `None` where the driver has queued no buffer yet.
    pub(super) fn announce_reset(&mut self) -> Result<Option<u16>, DeviceError> {
        let chain = match self.event.pop(&self.ram)? {
            Some(chain) => chain,
            None => {
                if self.event.enable_notification(&self.ram)? {
                    // A buffer came in between. It is used after other handlers had their turn.
                    self.event.requeue()?;
                }
                return Ok(None);
            }
        };
        let position = self.event.driver_position(&self.ram)?;
        if chain.writer().write_all(&EVENT_TRANSPORT_RESET).is_err() {
            let reason = "an event buffer is shorter than an event";
            return Err(self.event.driver_error(reason));
        }
        self.event.push_used(&self.ram, chain.head(), 4)?;
        self.event.signal(&self.ram, &*self.interrupt)?;
        Ok(Some(position))
    }

    /// Whether the driver has passed `position` in the event queue. If not, it will notify the
    /// device when it does.
    pub(super) fn passed(&mut self, position: u16) -> Result<bool, DeviceError> {
        if self.event.driver_position(&self.ram)? != position {
            return Ok(true);
        }
        self.event.enable_notification_beyond(&self.ram, position)
    }
}

/// Handles the guest's packets.
struct FromGuest<'a>(&'a mut Mux);

impl<'m> RequestHandler<'m> for FromGuest<'_> {
    fn handle(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<Served, DeviceError> {
        let mut reader = chain.reader();
        let Ok(bytes) = reader.read_array::<HEADER_LEN>() else {
            return Err(queue.driver_error("a packet is shorter than its header"));
        };
        let header = Header::decode(&bytes);
        let len = header.len;
        let Ok(payload) = reader.take(len as usize) else {
            let reason = format_args!("a packet has less than its {len} bytes");
            return Err(queue.driver_error(reason));
        };
        self.0.receive(&header, payload);
        Ok(Served::Used {
            written: 0,
            bytes: len.into(),
        })
    }

    fn is_ready(&self) -> bool {
        !self.0.is_congested()
    }
}

/// Fills the guest's buffers with packets.
struct ToGuest<'a>(&'a mut Mux);

impl<'m> RequestHandler<'m> for ToGuest<'_> {
    fn handle(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<Served, DeviceError> {
        // Room for data is demanded of every buffer: which packet will land in it is not known to
        // the driver.
        let (mut front, room) = match chain.writer().split_at(HEADER_LEN) {
            Ok((front, room)) if room.remaining() > 0 => (front, room),
            _ => return Err(queue.driver_error("a receive buffer has no room for data")),
        };
        let Some(packet) = self.0.next_packet(&room) else {
            return Ok(Served::Returned);
        };
        let written = front.write_all(&packet.encode());
        written.map_err(|error| queue.driver_error(error))?;
        Ok(Served::Used {
            written: HEADER_LEN as u32 + packet.len,
            bytes: packet.len.into(),
        })
    }

    fn is_ready(&self) -> bool {
        self.0.has_packets()
    }
}
