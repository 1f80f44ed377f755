//! The userspace data path of one queue pair: frames between the port and the guest's buffers.
//!
//! No KVM and no event loop in here. Each call moves a bounded number of frames and says why it
//! stopped; who waits for what is `pair.rs`'s affair.
//!
//! Source: VIRTIO 1.3, 5.1.6 (device operation).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::time::Instant;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::DEVICE;
use super::buffers::{ChainError, Direction, Scatter};
use super::counters::Counters;
use super::tap::HEADER_LEN;
use crate::rate_limit::RateLimiter;
use crate::virtio::{ActiveQueue, DeviceError, GuestRam};

/// Frames moved by one call.
const BUDGET: usize = 128;

/// The most bytes of a frame with its header: 64 KiB of segmentation offload and the largest
/// link header. A longer frame is dropped.
pub(super) const MAX_FRAME: usize = HEADER_LEN + 65_536 + 64;

/// Where the number of buffers stands in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// Why a call stopped moving frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// It moved its budget; there may be more.
    Budget,
    /// The guest has no buffers out; it will kick when it adds some.
    NoBuffers,
    /// The port has no frames, or takes none for now.
    PortBusy,
    /// The rate limit; its timer tells when to go on.
    Limited,
}

/// What frames move between and by, besides the queue.
pub(super) struct Flow<'a> {
    /// Guest RAM.
    pub(super) ram: &'a GuestRam,
    /// The port.
    pub(super) port: &'a File,
    /// What is counted.
    pub(super) counters: &'a Counters,
    /// The limit of this direction.
    pub(super) limiter: Option<&'a mut RateLimiter>,
}

impl Flow<'_> {
    fn is_allowed(&mut self) -> Result<bool, DeviceError> {
        match &mut self.limiter {
            None => Ok(true),
            Some(limiter) => limiter
                .is_ready(Instant::now())
                .map_err(DEVICE.host_error("set the timer of its rate limit")),
        }
    }

    fn charge(&mut self, bytes: usize) {
        if let Some(limiter) = &mut self.limiter {
            limiter.charge(bytes as u64);
        }
    }
}

/// What one call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moved {
    /// Why it stopped.
    pub(super) stopped: Stopped,
    /// Whether the guest wants an interrupt.
    pub(super) interrupt: bool,
}

/// A chain in hand.
struct Taken {
    head: u16,
    len: usize,
}

/// The receive side: port to guest.
pub(super) struct Receiver {
    /// Whether a frame may be spread over several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    /// The length of the frame before: how much room is taken out for the next.
    expected: usize,
    /// Where the end of a frame lands that is longer than the room taken out for it.
    tail: Box<[u8]>,
}

impl Receiver {
    pub(super) fn new(mergeable: bool) -> Self {
        Self {
            mergeable,
            expected: 0,
            // Zeroed memory of this size is not touched before it is used.
            tail: vec![0; MAX_FRAME].into_boxed_slice(),
        }
    }

    /// Moves frames from the port to the guest.
    pub(super) fn run(
        &mut self,
        active: &mut ActiveQueue,
        mut flow: Flow<'_>,
    ) -> Result<Moved, DeviceError> {
        let ram = flow.ram;
        let index = active.index;
        let queue = &mut active.queue;
        let mut scatter = Scatter::new(ram);
        let mut taken = Vec::with_capacity(8);
        let mut any_used = false;
        let mut stopped = Stopped::Budget;
        queue
            .disable_notification(ram)
            .map_err(DEVICE.queue_error(index))?;
        let mut left = BUDGET;
        while left > 0 {
            if !flow.is_allowed()? {
                stopped = Stopped::Limited;
                break;
            }
            scatter.clear();
            taken.clear();
            let wanted = self.expected.max(1);
            self.take_room(queue, index, &mut scatter, &mut taken, wanted)?;
            if taken.is_empty() {
                if queue
                    .enable_notification(ram)
                    .map_err(DEVICE.queue_error(index))?
                {
                    left -= 1;
                    continue;
                }
                stopped = Stopped::NoBuffers;
                break;
            }
            let len = match scatter.read_frame(flow.port, &mut self.tail) {
                Ok(len) => len,
                Err(error) => {
                    give_back(queue, taken.len());
                    match error.kind() {
                        ErrorKind::Interrupted => continue,
                        ErrorKind::WouldBlock => {
                            stopped = Stopped::PortBusy;
                            break;
                        }
                        _ => return Err(DEVICE.host_error("read the tap")(error)),
                    }
                }
            };
            left -= 1;
            if self.deliver(queue, index, ram, &mut scatter, &mut taken, len)? {
                any_used = true;
                flow.counters.received(len - HEADER_LEN);
                flow.charge(len - HEADER_LEN);
            } else {
                give_back(queue, taken.len());
                flow.counters.receive_dropped();
            }
        }
        let interrupt = any_used
            && queue
                .needs_notification(ram)
                .map_err(DEVICE.queue_error(index))?;
        Ok(Moved { stopped, interrupt })
    }

    /// Takes chains until they hold `wanted` bytes, or one where frames are not merged.
    fn take_room<'ram>(
        &self,
        queue: &mut Queue,
        index: u16,
        scatter: &mut Scatter<'ram>,
        taken: &mut Vec<Taken>,
        wanted: usize,
    ) -> Result<(), DeviceError> {
        while scatter.len() < wanted {
            let Some(chain) = next_chain(queue, index, scatter.ram())? else {
                break;
            };
            let head = chain.head_index();
            let len = scatter
                .push_chain(chain, Direction::ToGuest)
                .map_err(broken)?;
            if len < HEADER_LEN {
                return Err(DEVICE.driver_error("a receive buffer is smaller than a header"));
            }
            taken.push(Taken { head, len });
            if !self.mergeable {
                break;
            }
        }
        Ok(())
    }

    /// Hands the frame of `len` bytes that was read to the guest, taking more chains if it needs
    /// them. Returns false where it must be dropped, with nothing used.
    fn deliver(
        &mut self,
        queue: &mut Queue,
        index: u16,
        ram: &GuestRam,
        scatter: &mut Scatter<'_>,
        taken: &mut Vec<Taken>,
        len: usize,
    ) -> Result<bool, DeviceError> {
        let room = scatter.len();
        // A frame that fills all the room there is may have been cut.
        if len < HEADER_LEN || len >= room + self.tail.len() {
            return Ok(false);
        }
        if len > room {
            if !self.mergeable {
                return Ok(false);
            }
            self.take_room(queue, index, scatter, taken, len)?;
            if scatter.len() < len {
                return Ok(false);
            }
            scatter.write_at(room, &self.tail[..len - room]);
        }
        self.expected = len;
        let mut left = len;
        let mut buffers = 0;
        for chain in &mut *taken {
            chain.len = chain.len.min(left);
            left -= chain.len;
            buffers += 1;
            if left == 0 {
                break;
            }
        }
        // At most 1,023, the most segments of a list.
        let count = (buffers as u16).to_le_bytes();
        scatter.write_at(NUM_BUFFERS_OFFSET, &count);
        for chain in &taken[..buffers] {
            queue
                .add_used(ram, chain.head, chain.len as u32)
                .map_err(DEVICE.queue_error(index))?;
        }
        give_back(queue, taken.len() - buffers);
        Ok(true)
    }
}

/// Moves frames from the guest to the port.
pub(super) fn transmit(active: &mut ActiveQueue, mut flow: Flow<'_>) -> Result<Moved, DeviceError> {
    let ram = flow.ram;
    let index = active.index;
    let queue = &mut active.queue;
    let mut scatter = Scatter::new(ram);
    let mut any_used = false;
    let mut stopped = Stopped::Budget;
    queue
        .disable_notification(ram)
        .map_err(DEVICE.queue_error(index))?;
    let mut left = BUDGET;
    while left > 0 {
        if !flow.is_allowed()? {
            stopped = Stopped::Limited;
            break;
        }
        let Some(chain) = next_chain(queue, index, ram)? else {
            if queue
                .enable_notification(ram)
                .map_err(DEVICE.queue_error(index))?
            {
                left -= 1;
                continue;
            }
            stopped = Stopped::NoBuffers;
            break;
        };
        let head = chain.head_index();
        scatter.clear();
        let len = scatter
            .push_chain(chain, Direction::FromGuest)
            .map_err(broken)?;
        if len < HEADER_LEN {
            return Err(DEVICE.driver_error("a frame to send is shorter than its header"));
        }
        match send(&scatter, flow.port, flow.counters) {
            Ok(()) => flow.charge(len - HEADER_LEN),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                give_back(queue, 1);
                stopped = Stopped::PortBusy;
                break;
            }
            Err(error) => return Err(DEVICE.host_error("write to the tap")(error)),
        }
        left -= 1;
        queue
            .add_used(ram, head, 0)
            .map_err(DEVICE.queue_error(index))?;
        any_used = true;
    }
    let interrupt = any_used
        && queue
            .needs_notification(ram)
            .map_err(DEVICE.queue_error(index))?;
    Ok(Moved { stopped, interrupt })
}

/// Sends one frame, or counts it as dropped where the port has an objection to it alone.
fn send(frame: &Scatter<'_>, port: &File, counters: &Counters) -> io::Result<()> {
    if frame.len() > MAX_FRAME {
        counters.transmit_dropped();
        return Ok(());
    }
    loop {
        match frame.write_frame(port) {
            Ok(_) => {
                counters.transmitted(frame.len() - HEADER_LEN);
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => match error.raw_os_error() {
                // The tap is gone, or there is no room just now.
                Some(libc::EBADFD | libc::ENODEV | libc::EBADF | libc::EAGAIN) => {
                    return Err(error);
                }
                // A bad header (EINVAL), an interface that is down (EIO), no memory: the frame is
                // lost, as on a wire.
                _ => {
                    counters.transmit_dropped();
                    return Ok(());
                }
            },
        }
    }
}

/// Takes the next chain that the driver made available.
pub(super) fn next_chain<'ram>(
    queue: &mut Queue,
    index: u16,
    ram: &'ram GuestRam,
) -> Result<Option<DescriptorChain<&'ram GuestRam>>, DeviceError> {
    Ok(queue.iter(ram).map_err(DEVICE.queue_error(index))?.next())
}

/// Makes the last `count` chains taken available again.
fn give_back(queue: &mut Queue, count: usize) {
    // No more are ever taken than the queue is long.
    queue.set_next_avail(queue.next_avail().wrapping_sub(count as u16));
}

/// An error of the queue of index `queue`.
fn broken(error: ChainError) -> DeviceError {
    DEVICE.driver_error(&error.to_string())
}
