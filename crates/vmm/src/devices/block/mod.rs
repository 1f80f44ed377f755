//! The virtio block device: a disk ([`clone_disk::Disk`]) as the guest sees it.
//!
//! Requests of a kick go to the disk together, and answers that are there at once (the page cache
//! is often quick) cost no second wake-up. Formats, layers and files are `clone-disk`'s affair.
//! Where the driver does not know flushes, every change is flushed before it is answered.
//!
//! Source: VIRTIO 1.3, 5.2.

mod queue;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use clone_disk::{Completion, Disk, Request};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use crate::rate_limit::RateLimiter;
use crate::virtio::budget::Budget;
use crate::virtio::{Activation, DeviceError, DeviceName, VirtioDevice};
use queue::{Ask, Parsed, parse};
pub use state::{BlockConfig, BlockState, BlockStateV1, ID_BYTES, MAX_QUEUES, SeenDisk};
use state::{CONFIG_BYTES, QUEUE_SIZE};

/// The device's name in messages.
const DEVICE: DeviceName = DeviceName::new("block");
/// What guests address.
const SECTOR: u64 = 512;
/// Work of one call: a guest that never stops must not hold the event loop.
const BUDGET: Budget = Budget::new(4 * QUEUE_SIZE as usize, 16 << 20);
/// Bytes that the disk has at a time, beside those of one request: a pause waits for them.
const MAX_IN_FLIGHT: u64 = 64 << 20;

/// The token of the rate limiter's timer.
const TOKEN_TIMER: u32 = 0;
/// The tokens of the disk's descriptors start here.
const TOKEN_DISK: u32 = 1;

/// A disk that a device serves and that others (snapshots) freeze while the device is paused. The
/// lock is held for the length of one call, by the event loop while the machine runs.
pub type SharedDisk = Arc<Mutex<Disk>>;

/// A request of the guest that the disk has.
struct Pending {
    /// The queue's place in [`Activation::queues`].
    slot: usize,
    head: u16,
    status: GuestAddress,
    written: u32,
    /// The bytes of its data.
    bytes: u64,
    /// Whether a flush must follow before the answer.
    flush: bool,
}

/// A block device.
pub struct Block {
    disk: SharedDisk,
    state: BlockStateV1,
    config: [u8; CONFIG_BYTES],
    limiter: Option<RateLimiter>,
    active: Option<Activation>,
    /// Requests that the disk has, by their tag.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// The bytes of all pending requests.
    in_flight: u64,
    /// A request waits until the disk has fewer.
    held_back: bool,
    /// Used buffers were added since the guest was last told, by queue slot.
    used: Vec<bool>,
    paused: bool,
    completions: Vec<Completion>,
}

impl Block {
    /// A device for `disk`, new or saved. A saved state must have seen a disk of the same size
    /// and access.
    ///
    /// # Errors
    /// [`DeviceError::State`] where they do not fit, [`DeviceError::Host`] without a timer.
    pub fn new(disk: SharedDisk, state: BlockState) -> Result<Self, DeviceError> {
        let BlockState::V1(state) = state;
        let seen = {
            let disk = lock(&disk);
            SeenDisk {
                size: disk.size(),
                read_only: disk.is_read_only(),
                block_size: disk.block_size(),
            }
        };
        let state = state.attach(seen)?;
        let limiter = RateLimiter::new(state.limits, Instant::now())
            .map_err(DEVICE.host_error("make a timer"))?;
        Ok(Self {
            disk,
            config: state.config_space(),
            state,
            limiter,
            active: None,
            pending: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            held_back: false,
            used: Vec::new(),
            paused: false,
            completions: Vec::new(),
        })
    }

    /// The disk, for freezing it while the device is paused.
    pub fn disk(&self) -> &SharedDisk {
        &self.disk
    }

    /// The descriptors of ours that the event loop watches, with their tokens.
    fn descriptors(&self) -> Vec<(u32, RawFd)> {
        let timer = self.limiter.iter().map(|l| (TOKEN_TIMER, l.as_raw_fd()));
        let fds = lock(&self.disk).wake_fds();
        timer.chain((TOKEN_DISK..).zip(fds)).collect()
    }

    /// Takes what is in the queue `slot`, hands it to the disk, and answers what is ready.
    fn serve(&mut self, slot: usize) -> Result<(), DeviceError> {
        let mut budget = BUDGET;
        loop {
            self.set_notification(slot, false)?;
            let stopped = self.take_chains(slot, &mut budget)?;
            self.poll()?;
            match stopped {
                // The timer goes on with it.
                Stopped::Limited => break,
                // What the disk finishes goes on with it; something may be finished already.
                Stopped::Full if self.in_flight > 0 => {
                    self.held_back = true;
                    break;
                }
                Stopped::Full => budget.spend(0),
                Stopped::Budget => {
                    self.kick(slot)?;
                    break;
                }
                Stopped::Empty if !self.set_notification(slot, true)? => break,
                Stopped::Empty => budget.spend(0),
            }
        }
        self.tell_guest()
    }

    /// Switches the driver's kicks on or off; on returns whether there is work after all.
    fn set_notification(&mut self, slot: usize, on: bool) -> Result<bool, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        let lent = &mut active.queues[slot];
        let result = if on {
            lent.queue.enable_notification(&active.ram)
        } else {
            lent.queue.disable_notification(&active.ram).map(|()| false)
        };
        result.map_err(DEVICE.queue_error(lent.index))
    }

    fn take_chains(&mut self, slot: usize, budget: &mut Budget) -> Result<Stopped, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Stopped::Empty);
        };
        let mut disk = lock(&self.disk);
        let now = self.limiter.is_some().then(Instant::now);
        let writeback = active.features >> VIRTIO_BLK_F_FLUSH & 1 != 0;
        let ram = &active.ram;
        let lent = &mut active.queues[slot];
        loop {
            if budget.is_spent() {
                return Ok(Stopped::Budget);
            }
            let mut chains = lent
                .queue
                .iter(ram)
                .map_err(DEVICE.queue_error(lent.index))?;
            let Some(chain) = chains.next() else {
                return Ok(Stopped::Empty);
            };
            let parsed = parse(chain, ram)?;
            let bytes = parsed.ask.bytes();
            if self.in_flight > 0 && self.in_flight.saturating_add(bytes) > MAX_IN_FLIGHT {
                lent.queue.go_to_previous_position();
                return Ok(Stopped::Full);
            }
            if let (Some(limiter), Some(now)) = (&mut self.limiter, now)
                && !limiter
                    .admit(bytes, now)
                    .map_err(DEVICE.host_error("set a timer"))?
            {
                lent.queue.go_to_previous_position();
                return Ok(Stopped::Limited);
            }
            budget.spend(bytes);
            let Parsed {
                head,
                status,
                ask,
                written,
            } = parsed;
            let (code, written) = match ask {
                Ask::Disk(request) => {
                    if self.pending.len() - self.free.len()
                        >= self.used.len() * usize::from(QUEUE_SIZE)
                    {
                        return Err(DEVICE.driver_error("more requests than its queues hold"));
                    }
                    let pending = Pending {
                        slot,
                        head,
                        status,
                        written,
                        bytes,
                        flush: !writeback && request.changes_disk(),
                    };
                    self.in_flight += bytes;
                    let tag = insert(&mut self.pending, &mut self.free, pending);
                    disk.submit(tag as u64, request);
                    continue;
                }
                Ask::Id(pieces) => {
                    pieces.write(ram, &self.state.id)?;
                    (VIRTIO_BLK_S_OK, written)
                }
                Ask::Refuse(code) => (code, 1),
            };
            answer(
                &mut lent.queue,
                lent.index,
                ram,
                head,
                status,
                code,
                written,
            )?;
            self.used[slot] = true;
        }
    }

    /// Starts what the disk was given, and answers the guest's requests that are over.
    fn poll(&mut self) -> Result<(), DeviceError> {
        let mut completions = std::mem::take(&mut self.completions);
        lock(&self.disk)
            .poll(&mut completions)
            .map_err(DEVICE.host_error("use the disk"))?;
        self.answer_all(&mut completions)?;
        self.completions = completions;
        Ok(())
    }

    /// Waits for all that the disk was given.
    fn drain(&mut self) -> Result<(), DeviceError> {
        let mut completions = Vec::new();
        // More than one round where flushes follow changes.
        while self.pending.len() > self.free.len() {
            lock(&self.disk)
                .drain(&mut completions)
                .map_err(DEVICE.host_error("use the disk"))?;
            self.answer_all(&mut completions)?;
        }
        Ok(())
    }

    fn answer_all(&mut self, completions: &mut Vec<Completion>) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mut flushes = false;
        for Completion { tag, result } in completions.drain(..) {
            let Some(entry) = self.pending.get_mut(tag as usize) else {
                continue;
            };
            if let (Some(pending), Ok(())) = (entry.as_mut(), &result)
                && std::mem::take(&mut pending.flush)
            {
                lock(&self.disk).submit(tag, Request::Flush);
                flushes = true;
                continue;
            }
            let Some(pending) = entry.take() else {
                continue;
            };
            self.free.push(tag as usize);
            self.in_flight -= pending.bytes;
            let (code, written) = match &result {
                Ok(()) => (VIRTIO_BLK_S_OK, pending.written),
                Err(error) => (status_of(error), 1),
            };
            let lent = &mut active.queues[pending.slot];
            answer(
                &mut lent.queue,
                lent.index,
                &active.ram,
                pending.head,
                pending.status,
                code,
                written,
            )?;
            self.used[pending.slot] = true;
        }
        if flushes {
            // Their answers come by the disk's descriptors, or right now.
            let mut more = Vec::new();
            lock(&self.disk)
                .poll(&mut more)
                .map_err(DEVICE.host_error("use the disk"))?;
            return self.answer_all(&mut more);
        }
        Ok(())
    }

    /// Interrupts the guest for queues with new used buffers, where it wants that.
    fn tell_guest(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        for (lent, used) in active.queues.iter_mut().zip(&mut self.used) {
            if !std::mem::take(used) {
                continue;
            }
            let wanted = lent.queue.needs_notification(&active.ram);
            if wanted.map_err(DEVICE.queue_error(lent.index))? {
                active.interrupt.signal_queue(lent.index);
            }
        }
        Ok(())
    }

    /// Makes the event loop come back to a queue.
    fn kick(&self, slot: usize) -> Result<(), DeviceError> {
        self.active.as_ref().map_or(Ok(()), |active| {
            active.queues[slot]
                .kick
                .write(1)
                .map_err(DEVICE.host_error("kick a queue"))
        })
    }

    fn slots(&self) -> std::ops::Range<usize> {
        0..self.active.as_ref().map_or(0, |active| active.queues.len())
    }
}

/// Why a call stopped taking chains.
enum Stopped {
    /// There are none.
    Empty,
    /// It took its share.
    Budget,
    /// The rate limit holds the next one back.
    Limited,
    /// The disk has enough to do.
    Full,
}

impl Ask {
    /// The bytes that count towards a rate limit.
    fn bytes(&self) -> u64 {
        match self {
            Self::Disk(request) => request.data_len(),
            Self::Id(_) | Self::Refuse(_) => 0,
        }
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> DeviceName {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.state.features()
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.state.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = start
                .checked_add(index)
                .and_then(|at| self.config.get(at).copied())
                .unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        for (token, fd) in self.descriptors() {
            activation
                .events
                .add(&fd, token, EventSet::IN)
                .map_err(DEVICE.host_error("watch the disk"))?;
        }
        self.used = vec![false; activation.queues.len()];
        self.active = Some(activation);
        self.paused = false;
        // Looked at by the event loop, not by the vCPU that is here now: the disk's thread is
        // started by the first request, and inherits from its starter what it may do.
        self.slots().try_for_each(|slot| self.kick(slot))
    }

    fn notify_queue(&mut self, queue: u16) -> Result<(), DeviceError> {
        if self.paused {
            return Ok(());
        }
        let slot = self
            .active
            .as_ref()
            .and_then(|active| active.queues.iter().position(|lent| lent.index == queue));
        slot.map_or(Ok(()), |slot| self.serve(slot))
    }

    fn handle_event(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        if token != TOKEN_TIMER {
            self.poll()?;
            if !std::mem::take(&mut self.held_back) {
                return self.tell_guest();
            }
        } else if let Some(limiter) = &mut self.limiter {
            limiter
                .acknowledge()
                .map_err(DEVICE.host_error("read a timer"))?;
        }
        if self.paused {
            return self.tell_guest();
        }
        self.slots().try_for_each(|slot| self.serve(slot))
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.paused = true;
        self.drain()?;
        self.tell_guest()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.paused = false;
        self.slots().try_for_each(|slot| self.kick(slot))
    }

    fn reset(&mut self) {
        if let Err(error) = self.drain() {
            // The driver is gone, or broke the rings that the answers belong in.
            tracing::debug!(%error, "answers lost in a reset of a block device");
            let drained = lock(&self.disk).drain(&mut self.completions);
            if let Err(error) = drained {
                tracing::error!(%error, "a disk does not come to rest");
            }
            self.completions.clear();
        }
        self.pending.clear();
        self.free.clear();
        self.in_flight = 0;
        self.held_back = false;
        if let Some(active) = self.active.take() {
            for (_, fd) in self.descriptors() {
                // It was added by `activate`; where that failed half way there is none to remove.
                let _ = active.events.remove(&fd);
            }
        }
    }

    fn queues(&self) -> Vec<(u16, &Queue)> {
        self.active
            .iter()
            .flat_map(|active| &active.queues)
            .map(|lent| (lent.index, &lent.queue))
            .collect()
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        BlockState::V1(self.state.clone()).encode()
    }
}

impl Drop for Block {
    /// The disk may live on elsewhere: what it has of this device's RAM must be over.
    fn drop(&mut self) {
        self.reset();
    }
}

/// Puts the status and the used element of a chain into RAM.
fn answer(
    queue: &mut Queue,
    index: u16,
    ram: &crate::virtio::GuestRam,
    head: u16,
    status: GuestAddress,
    code: u32,
    written: u32,
) -> Result<(), DeviceError> {
    ram.write_obj(code as u8, status)
        .map_err(|_| DEVICE.driver_error("a status outside of RAM"))?;
    queue
        .add_used(ram, head, written)
        .map_err(DEVICE.queue_error(index))
}

fn status_of(error: &io::Error) -> u32 {
    match error.kind() {
        io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
        _ => VIRTIO_BLK_S_IOERR,
    }
}

fn insert(entries: &mut Vec<Option<Pending>>, free: &mut Vec<usize>, pending: Pending) -> usize {
    if let Some(index) = free.pop() {
        entries[index] = Some(pending);
        return index;
    }
    entries.push(Some(pending));
    entries.len() - 1
}

fn lock(disk: &SharedDisk) -> MutexGuard<'_, Disk> {
    // A panic elsewhere while holding it is not ours to judge; the disk checks its own state.
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}
