//! The userspace data path of one queue pair: frames between the port and the guest's buffers.
//!
//! This does not depend on KVM or the event loop. Each call moves a bounded number of frames and
//! returns why it stopped; `pair.rs` decides what to wait for then.
//!
//! Source: VIRTIO 1.3, 5.1.6 (device operation).

use std::fs::File;
use std::io::{self, ErrorKind};

use super::DEVICE;
use super::counters::Counters;
use super::iovec::IoVec;
use super::tap::HEADER_LEN;
use crate::rate_limit::RateLimiter;
use crate::virtio::budget::Budget;
use crate::virtio::{
    DescriptorChain, DeviceError, GuestRam, Interrupt, RequestHandler, Served, ServedQueue,
    Stopped, Turn,
};

/// The frames that one call moves.
const BUDGET: Budget = Budget::new(128, u64::MAX);

/// The most bytes of a frame with its header: 64 KiB of segmentation offload and the largest
/// link header. A longer frame is dropped.
pub(super) const MAX_FRAME: usize = HEADER_LEN + 65_536 + 64;

/// The offset of the number of buffers in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// One direction of a queue pair: what frames move between, besides the queue.
pub(super) struct Direction<'a> {
    /// Guest RAM.
    pub(super) ram: &'a GuestRam,
    /// The device's way to interrupt its driver.
    pub(super) interrupt: &'a dyn Interrupt,
    /// The port.
    pub(super) port: &'a File,
    /// The counters of the device.
    pub(super) counters: &'a Counters,
    /// The rate limit of this direction.
    pub(super) limiter: Option<&'a mut RateLimiter>,
}

impl<'a> Direction<'a> {
    /// Moves frames. [`Stopped::Blocked`] means that the port has no frame, or takes none for now.
    fn serve(
        self,
        queue: &mut ServedQueue,
        handler: &mut impl RequestHandler<'a>,
    ) -> Result<Stopped, DeviceError> {
        let mut budget = BUDGET;
        let mut turn = Turn {
            budget: &mut budget,
            limit: self.limiter,
        };
        queue.serve(self.ram, self.interrupt, &mut turn, handler)
    }
}

/// A chain that a frame is received into.
struct FrameChain {
    head: u16,
    len: usize,
}

/// The receive side: port to guest.
pub(super) struct Receiver {
    /// Whether a frame may be spread over several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    /// The length of the frame before: how much room is taken out for the next.
    expected: usize,
    /// Receives the end of a frame that is longer than the room taken out for it.
    tail: Box<[u8]>,
    /// The chains of the present frame. The allocation is kept for further frames.
    taken: Vec<FrameChain>,
}

impl Receiver {
    pub(super) fn new(mergeable: bool) -> Self {
        Self {
            mergeable,
            expected: 0,
            // Zeroed memory of this size is not touched before it is used.
            tail: vec![0; MAX_FRAME].into_boxed_slice(),
            taken: Vec::with_capacity(8),
        }
    }

    /// Moves frames from the port to the guest.
    pub(super) fn receive(
        &mut self,
        queue: &mut ServedQueue,
        direction: Direction<'_>,
    ) -> Result<Stopped, DeviceError> {
        let mut handler = ReceiveFrames {
            receiver: self,
            ram: direction.ram,
            port: direction.port,
            counters: direction.counters,
            room: IoVec::new(),
            more: DescriptorChain::new(),
        };
        direction.serve(queue, &mut handler)
    }
}

/// Receives a frame into each request, and into those that follow it where frames are merged.
struct ReceiveFrames<'a, 'm> {
    receiver: &'a mut Receiver,
    ram: &'m GuestRam,
    port: &'a File,
    counters: &'a Counters,
    /// The room of all chains that were taken before the frame was read.
    room: IoVec<'m>,
    /// A chain taken besides the first.
    more: DescriptorChain<'m>,
}

impl<'m> RequestHandler<'m> for ReceiveFrames<'_, 'm> {
    fn handle(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<Served, DeviceError> {
        self.room.clear();
        self.receiver.taken.clear();
        self.add(queue, chain)?;
        self.take_room(queue)?;
        let Some(len) = self.read_frame()? else {
            queue.undo_pop(self.receiver.taken.len() as u16 - 1);
            return Ok(Served::Blocked);
        };
        if !self.deliver(queue, chain, len)? {
            self.counters.receive_dropped();
            queue.undo_pop(self.receiver.taken.len() as u16 - 1);
            return Ok(Served::Returned);
        }
        self.counters.received(len - HEADER_LEN);
        let bytes = (len - HEADER_LEN) as u64;
        Ok(Served::Kept { bytes })
    }

    /// The tap stays readable while it has frames, which calls again.
    fn needs_requeue(&self) -> bool {
        false
    }
}

impl<'m> ReceiveFrames<'_, 'm> {
    /// Adds a chain's room to the room for the frame.
    fn add(&mut self, queue: &ServedQueue, chain: &DescriptorChain<'m>) -> Result<(), DeviceError> {
        self.receiver.take(queue, chain)?;
        self.room
            .extend(chain.writer().segments())
            .map_err(|error| queue.driver_error(error))
    }

    /// Takes further chains until there is room for a frame as long as the one before.
    fn take_room(&mut self, queue: &mut ServedQueue) -> Result<(), DeviceError> {
        while self.receiver.mergeable
            && self.room.len() < self.receiver.expected
            && queue.pop_into(self.ram, &mut self.more)?
        {
            self.receiver.take(queue, &self.more)?;
            self.room
                .extend(self.more.writer().segments())
                .map_err(|error| queue.driver_error(error))?;
        }
        Ok(())
    }

    /// Reads a frame, or returns `None` where the port has none.
    fn read_frame(&mut self) -> Result<Option<usize>, DeviceError> {
        loop {
            match self.room.read_frame(self.port, &mut self.receiver.tail) {
                Ok(len) => return Ok(Some(len)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(DEVICE.host_error("read the tap")(error)),
            }
        }
    }

    /// Gives the frame of `len` bytes that was read to the guest. Takes more chains if it needs
    /// them. Returns false where the frame must be dropped, with nothing used.
    fn deliver(
        &mut self,
        queue: &mut ServedQueue,
        first: &DescriptorChain<'m>,
        len: usize,
    ) -> Result<bool, DeviceError> {
        let room = self.room.len();
        // A frame that fills all the room may have been cut.
        if len < HEADER_LEN || len >= room + self.receiver.tail.len() {
            return Ok(false);
        }
        if len > room && !self.spread_tail(queue, len - room)? {
            return Ok(false);
        }
        self.receiver.expected = len;
        let buffers = self.receiver.cut_to(len);
        // Every first chain has room for a header.
        let count = (buffers as u16).to_le_bytes();
        first
            .writer()
            .split_at(NUM_BUFFERS_OFFSET)
            .and_then(|(_, mut field)| field.write_all(&count))
            .map_err(|error| queue.driver_error(error))?;
        self.receiver.give_back(queue, self.ram, buffers)?;
        Ok(true)
    }

    /// Writes the first `len` bytes of the tail into further chains. Returns false where there are
    /// too few of them, or frames are not merged.
    fn spread_tail(&mut self, queue: &mut ServedQueue, len: usize) -> Result<bool, DeviceError> {
        let mut done = 0;
        while done < len {
            if !self.receiver.mergeable || !queue.pop_into(self.ram, &mut self.more)? {
                return Ok(false);
            }
            self.receiver.take(queue, &self.more)?;
            let end = len.min(done + self.more.writable_len());
            self.more
                .writer()
                .write_all(&self.receiver.tail[done..end])
                .map_err(|error| queue.driver_error(error))?;
            done = end;
        }
        Ok(true)
    }
}

impl Receiver {
    /// Notes a chain that was taken for the frame.
    fn take(
        &mut self,
        queue: &ServedQueue,
        chain: &DescriptorChain<'_>,
    ) -> Result<(), DeviceError> {
        if chain.readable_len() > 0 {
            return Err(queue.driver_error("a receive buffer is not writable"));
        }
        if chain.writable_len() < HEADER_LEN {
            return Err(queue.driver_error("a receive buffer is smaller than a header"));
        }
        self.taken.push(FrameChain {
            head: chain.head(),
            len: chain.writable_len(),
        });
        Ok(())
    }

    /// Divides a frame of `len` bytes among the chains. Returns the number of chains it fills.
    fn cut_to(&mut self, len: usize) -> usize {
        let mut left = len;
        for (index, chain) in self.taken.iter_mut().enumerate() {
            chain.len = chain.len.min(left);
            left -= chain.len;
            if left == 0 {
                return index + 1;
            }
        }
        self.taken.len()
    }

    /// Gives the first `buffers` chains to the driver, and puts the others back.
    fn give_back(
        &self,
        queue: &mut ServedQueue,
        ram: &GuestRam,
        buffers: usize,
    ) -> Result<(), DeviceError> {
        for chain in &self.taken[..buffers] {
            queue.push_used(ram, chain.head, chain.len as u32)?;
        }
        // No more are ever taken than the queue is long.
        queue.undo_pop((self.taken.len() - buffers) as u16);
        Ok(())
    }
}

/// Moves frames from the guest to the port.
pub(super) fn transmit(
    queue: &mut ServedQueue,
    direction: Direction<'_>,
) -> Result<Stopped, DeviceError> {
    let mut handler = TransmitFrames {
        port: direction.port,
        counters: direction.counters,
        frame: IoVec::new(),
    };
    direction.serve(queue, &mut handler)
}

/// Sends the frame in each request.
struct TransmitFrames<'a, 'm> {
    port: &'a File,
    counters: &'a Counters,
    frame: IoVec<'m>,
}

impl<'m> RequestHandler<'m> for TransmitFrames<'_, 'm> {
    fn handle(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<Served, DeviceError> {
        if chain.writable_len() > 0 {
            return Err(queue.driver_error("a frame to send has a writable buffer"));
        }
        let Some(bytes) = chain.readable_len().checked_sub(HEADER_LEN) else {
            return Err(queue.driver_error("a frame to send is shorter than its header"));
        };
        self.frame.clear();
        let extended = self.frame.extend(chain.reader().segments());
        extended.map_err(|error| queue.driver_error(error))?;
        match send(&self.frame, self.port, self.counters) {
            Ok(()) => Ok(Served::Used {
                written: 0,
                bytes: bytes as u64,
            }),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Served::Blocked),
            Err(error) => Err(DEVICE.host_error("write to the tap")(error)),
        }
    }
}

/// Sends one frame, or counts it as dropped where the port refuses this frame only.
fn send(frame: &IoVec<'_>, port: &File, counters: &Counters) -> io::Result<()> {
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
