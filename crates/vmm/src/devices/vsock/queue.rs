//! The three queues: packets for the guest, packets from it, and events (VIRTIO 1.3, 5.10.2).
//!
//! Work is bounded per call: after [`BUDGET`] packets the queues kick themselves, so that other
//! devices get their turn. Interrupts are raised once per call.

use std::sync::Arc;

use super::mux::Mux;
use super::packet::{HEADER_LEN, Header};
use crate::virtio::budget::Budget;
use crate::virtio::ring::{Ring, Segment, read_prefix, write_prefix};
use crate::virtio::{DeviceError, GuestRam, Interrupt};

/// Packets handled in each direction, and their data, before others have their turn.
const BUDGET: Budget = Budget::new(256, 8 << 20);

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone.
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Why serving a queue stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Nothing is left to do.
    Idle,
    /// There is work, but the driver has to make room first.
    Blocked,
    /// There is work, but others have their turn.
    Budget,
}

/// What the driver lent at activation.
pub(super) struct Queues {
    pub(super) ram: GuestRam,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) event: Ring,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

impl Queues {
    /// Moves packets both ways until there is nothing left, no room, or enough done.
    pub(super) fn serve(&mut self, mux: &mut Mux) -> Result<(), DeviceError> {
        // One each: a guest that floods one direction must not starve the other.
        let (mut tx_budget, mut rx_budget) = (BUDGET, BUDGET);
        loop {
            let tx = self.serve_tx(mux, &mut tx_budget)?;
            let rx = self.serve_rx(mux, &mut rx_budget)?;
            if tx == Stop::Budget || rx == Stop::Budget {
                self.tx.again()?;
                break;
            }
            // Answers have gone out, so that there is room for more questions.
            if tx == Stop::Idle || rx == Stop::Blocked {
                break;
            }
        }
        self.tx.signal(&self.ram, &*self.interrupt)?;
        self.rx.signal(&self.ram, &*self.interrupt)
    }

    fn serve_tx(&mut self, mux: &mut Mux, budget: &mut Budget) -> Result<Stop, DeviceError> {
        self.tx.mute(&self.ram)?;
        loop {
            if mux.is_congested() {
                return Ok(Stop::Blocked);
            }
            if budget.is_spent() {
                return Ok(Stop::Budget);
            }
            let Some(mut chain) = self.tx.pop(&self.ram)? else {
                if self.tx.unmute(&self.ram)? {
                    budget.spend(0);
                    continue;
                }
                return Ok(Stop::Idle);
            };
            let mut bytes = [0; HEADER_LEN];
            let Some(payload) = read_prefix(&mut chain.readable, &mut bytes) else {
                return Err(self.tx.broken("a packet is shorter than its header"));
            };
            let header = Header::decode(&bytes);
            let Some(payload) = truncate(payload, header.len as usize) else {
                let len = header.len;
                return Err(self
                    .tx
                    .broken(format!("a packet has less than its {len} bytes")));
            };
            budget.spend(header.len.into());
            mux.receive(&header, payload);
            self.tx.push_used(&self.ram, chain.head, 0)?;
        }
    }

    fn serve_rx(&mut self, mux: &mut Mux, budget: &mut Budget) -> Result<Stop, DeviceError> {
        while mux.has_packets() {
            if budget.is_spent() {
                return Ok(Stop::Budget);
            }
            let Some(mut chain) = self.rx.pop(&self.ram)? else {
                if self.rx.unmute(&self.ram)? {
                    budget.spend(0);
                    continue;
                }
                return Ok(Stop::Blocked);
            };
            // Room for data is demanded of every buffer: which packet will land in it is not
            // known to the driver.
            let mut front = chain.writable.clone();
            let room = match write_prefix(&mut chain.writable, &[0; HEADER_LEN]) {
                Some(room) if !room.is_empty() => room,
                _ => return Err(self.rx.broken("a receive buffer has no room for data")),
            };
            let Some(packet) = mux.next_packet(room) else {
                self.rx.unpop();
                continue;
            };
            budget.spend(packet.len.into());
            write_prefix(&mut front, &packet.encode());
            let len = HEADER_LEN as u32 + packet.len;
            self.rx.push_used(&self.ram, chain.head, len)?;
        }
        self.rx.mute(&self.ram)?;
        Ok(Stop::Idle)
    }

    /// Tells the guest that its connections are gone. Returns the driver's position in the event
    /// queue just before it could know, or `None` where it lent no buffer yet.
    pub(super) fn announce_reset(&mut self) -> Result<Option<u16>, DeviceError> {
        let mut chain = match self.event.pop(&self.ram)? {
            Some(chain) => chain,
            None => {
                if self.event.unmute(&self.ram)? {
                    // One came in between: it is looked at when others had their turn.
                    self.event.again()?;
                }
                return Ok(None);
            }
        };
        let position = self.event.driver_position(&self.ram)?;
        if write_prefix(&mut chain.writable, &EVENT_TRANSPORT_RESET).is_none() {
            return Err(self
                .event
                .broken("an event buffer is shorter than an event"));
        }
        self.event.push_used(&self.ram, chain.head, 4)?;
        self.event.signal(&self.ram, &*self.interrupt)?;
        Ok(Some(position))
    }

    /// Whether the driver went past `position` in the event queue; if not, it will kick when it
    /// does.
    pub(super) fn passed(&mut self, position: u16) -> Result<bool, DeviceError> {
        if self.event.driver_position(&self.ram)? != position {
            return Ok(true);
        }
        self.event.unmute_beyond(&self.ram, position)
    }
}

/// The first `len` bytes of `segments`; `None` where they are fewer.
fn truncate<'s, 'm>(segments: &'s mut [Segment<'m>], len: usize) -> Option<&'s [Segment<'m>]> {
    let mut left = len;
    let mut count = 0;
    while left > 0 {
        let segment = segments.get_mut(count)?;
        let take = left.min(segment.slice.len());
        segment.slice = segment.slice.subslice(0, take).ok()?;
        left -= take;
        count += 1;
    }
    Some(&segments[..count])
}
