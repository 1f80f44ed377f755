//! A queue as a device serves it, and the buffers of one request, checked against RAM.
//!
//! What the guest wrote is hostile: [`Ring::pop`] hands out only chains that end, keep the order
//! of the specification (device-readable before device-writable, 2.7.4.2) and lie in RAM. What
//! the buffers mean is left to the device.

use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, DeviceError, DeviceName, GuestRam, Interrupt};

/// Buffers in one chain; a driver that needs more breaks its device.
const MAX_SEGMENTS: usize = 1024;

/// A stretch of one descriptor's buffer that is contiguous in host memory.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'m> {
    /// Where it starts in guest-physical memory.
    pub address: GuestAddress,
    /// The memory itself.
    pub slice: VolatileSlice<'m, ()>,
}

/// One request: the buffers of a descriptor chain.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Names the chain in [`Ring::push_used`].
    pub head: u16,
    /// What the driver wrote, in order.
    pub readable: Vec<Segment<'m>>,
    /// Where the device may write, in order.
    pub writable: Vec<Segment<'m>>,
}

impl Chain<'_> {
    /// The number of bytes the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable.iter().map(|part| part.slice.len()).sum()
    }

    /// The number of bytes the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|part| part.slice.len()).sum()
    }
}

/// Copies from `segments` into `buf` and returns what is left of the segments, or `None` where
/// they hold less than `buf` does.
pub fn read_prefix<'s, 'm>(
    segments: &'s mut [Segment<'m>],
    buf: &mut [u8],
) -> Option<&'s mut [Segment<'m>]> {
    let mut done = 0;
    let rest = split_front(segments, buf.len(), |slice| {
        slice.copy_to(&mut buf[done..done + slice.len()]);
        done += slice.len();
    })?;
    Some(rest)
}

/// Copies `bytes` to the front of `segments` and returns what is left of the segments, or `None`
/// (nothing useful written) where they are too short.
pub fn write_prefix<'s, 'm>(
    segments: &'s mut [Segment<'m>],
    bytes: &[u8],
) -> Option<&'s mut [Segment<'m>]> {
    let mut done = 0;
    split_front(segments, bytes.len(), |slice| {
        slice.copy_from(&bytes[done..done + slice.len()]);
        done += slice.len();
    })
}

/// Takes `len` bytes off the front, handing each piece to `take`.
fn split_front<'s, 'm>(
    segments: &'s mut [Segment<'m>],
    len: usize,
    mut take: impl FnMut(VolatileSlice<'m, ()>),
) -> Option<&'s mut [Segment<'m>]> {
    let mut left = len;
    let mut next = 0;
    while left > 0 {
        let segment = segments.get_mut(next)?;
        if segment.slice.len() <= left {
            left -= segment.slice.len();
            take(segment.slice);
            next += 1;
        } else {
            take(segment.slice.subslice(0, left).ok()?);
            segment.slice = segment.slice.offset(left).ok()?;
            segment.address = GuestAddress(segment.address.0 + left as u64);
            left = 0;
        }
    }
    Some(&mut segments[next..])
}

/// A queue that a device serves, with what its errors must name.
pub struct Ring {
    device: DeviceName,
    index: u16,
    queue: Queue,
    kick: EventFd,
}

impl Ring {
    /// Takes over an active queue; `event_idx` tells whether `VIRTIO_RING_F_EVENT_IDX` was
    /// agreed on.
    pub fn new(device: DeviceName, active: ActiveQueue, event_idx: bool) -> Self {
        let mut queue = active.queue;
        queue.set_event_idx(event_idx);
        Self {
            device,
            index: active.index,
            queue,
            kick: active.kick,
        }
    }

    /// The queue's index and its present position.
    pub fn queue(&self) -> (u16, &Queue) {
        (self.index, &self.queue)
    }

    /// The next request, or `None` when the driver has none waiting.
    pub fn pop<'m>(&mut self, ram: &'m GuestRam) -> Result<Option<Chain<'m>>, DeviceError> {
        let next = self
            .queue
            .iter(ram)
            .map_err(|source| queue_error(self.device, self.index, source))?
            .next();
        next.map(|chain| self.collect(ram, chain)).transpose()
    }

    /// Puts back the request that [`Ring::pop`] returned last.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    fn collect<'m>(
        &self,
        ram: &'m GuestRam,
        chain: DescriptorChain<&GuestRam>,
    ) -> Result<Chain<'m>, DeviceError> {
        let mut result = Chain {
            head: chain.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut ended = false;
        for descriptor in chain {
            let (address, len) = (descriptor.addr(), descriptor.len() as usize);
            let (list, access) = if descriptor.is_write_only() {
                (&mut result.writable, Permissions::Write)
            } else if result.writable.is_empty() {
                (&mut result.readable, Permissions::Read)
            } else {
                return Err(self.broken("a readable buffer follows a writable one"));
            };
            let outside = |_| self.broken(format!("buffer {address:?}+{len:#x} is not in RAM"));
            let mut at = address.0;
            for slice in ram.get_slices(address, len, access).map_err(outside)? {
                let slice = slice.map_err(outside)?;
                list.push(Segment {
                    address: GuestAddress(at),
                    slice,
                });
                at += slice.len() as u64;
            }
            if result.readable.len() + result.writable.len() > MAX_SEGMENTS {
                return Err(self.broken(format!("more than {MAX_SEGMENTS} buffers in a request")));
            }
            ended = !descriptor.has_next();
        }
        // The iterator also stops at loops, bad indices and bad indirect tables, without a word.
        if ended {
            Ok(result)
        } else {
            Err(self.broken(format!("descriptor chain {} has no end", result.head)))
        }
    }

    /// Gives a request back to the driver, with `len` bytes written into it.
    pub fn push_used(&mut self, ram: &GuestRam, head: u16, len: u32) -> Result<(), DeviceError> {
        self.queue
            .add_used(ram, head, len)
            .map_err(|source| queue_error(self.device, self.index, source))
    }

    /// Interrupts the driver if it wants to know of what was pushed since the last call. Call it
    /// once per batch.
    pub fn signal(&mut self, ram: &GuestRam, interrupt: &dyn Interrupt) -> Result<(), DeviceError> {
        let wanted = self
            .queue
            .needs_notification(ram)
            .map_err(|source| queue_error(self.device, self.index, source))?;
        if wanted {
            interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to kick: the device will look by itself.
    pub fn mute(&mut self, ram: &GuestRam) -> Result<(), DeviceError> {
        self.queue
            .disable_notification(ram)
            .map_err(|source| queue_error(self.device, self.index, source))
    }

    /// Asks for a kick at the next request. `true` if one came in between: look again.
    pub fn unmute(&mut self, ram: &GuestRam) -> Result<bool, DeviceError> {
        self.queue
            .enable_notification(ram)
            .map_err(|source| queue_error(self.device, self.index, source))
    }

    /// The driver's position: how many requests it ever queued, wrapping.
    pub fn driver_position(&self, ram: &GuestRam) -> Result<u16, DeviceError> {
        self.queue
            .avail_idx(ram, Ordering::Acquire)
            .map(|position| position.0)
            .map_err(|source| queue_error(self.device, self.index, source))
    }

    /// Asks for a kick when the driver queues a request beyond those it queued up to `position`,
    /// whether or not the device has taken those. `true` if that happened already.
    pub fn unmute_beyond(&mut self, ram: &GuestRam, position: u16) -> Result<bool, DeviceError> {
        // The event index is written from the queue's own position, so move it for the call.
        let own = self.queue.next_avail();
        self.queue.set_next_avail(position);
        let more = self.unmute(ram);
        self.queue.set_next_avail(own);
        more
    }

    /// Makes the event loop come back to this queue, after others had their turn.
    pub fn again(&self) -> Result<(), DeviceError> {
        self.kick.write(1).map_err(|source| DeviceError::Host {
            device: self.device,
            action: "kick its own queue",
            source,
        })
    }

    /// The driver broke the specification on this queue.
    pub fn broken(&self, reason: impl std::fmt::Display) -> DeviceError {
        DeviceError::Driver {
            device: self.device,
            reason: format!("queue {}: {reason}", self.index),
        }
    }
}

fn queue_error(device: DeviceName, queue: u16, source: virtio_queue::Error) -> DeviceError {
    DeviceError::Queue {
        device,
        queue,
        source,
    }
}
