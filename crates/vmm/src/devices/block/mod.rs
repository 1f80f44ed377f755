//! The virtio block device: a disk ([`clone_disk::Disk`]) as the guest sees it.
//!
//! All requests of one notification go to the disk together, and requests that are complete at once
//! (from the page cache, for example) cost no second event. Image formats, layers and files are
//! handled by `clone-disk`. Where the driver has no flushes, every change is flushed before it is
//! completed.
//!
//! Source: VIRTIO 1.3, 5.2.

mod in_flight;
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
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use crate::rate_limit::RateLimiter;
use crate::virtio::budget::Budget;
use crate::virtio::{
    Activation, DescriptorChain, DeviceError, DeviceName, GuestRam, RequestHandler, RequestQueues,
    Served, ServedQueue, Stopped, Turn, VirtioDevice,
};
use in_flight::{InFlight, Pending};
use queue::{BlockRequest, Parsed, parse};
pub use state::{BlockConfig, BlockState, BlockStateV1, DiskProperties, ID_BYTES, MAX_QUEUES};
use state::{CONFIG_BYTES, QUEUE_SIZE};

/// The name that errors give the device.
const DEVICE: DeviceName = DeviceName::new("block");
/// The unit of addresses in requests, in bytes.
const SECTOR: u64 = 512;
/// The work of one call: a guest that sends requests without a pause must not hold up the event
/// loop.
const BUDGET: Budget = Budget::new(4 * QUEUE_SIZE as usize, 16 << 20);
/// The most bytes that the disk works on at a time, besides those of one request. A pause waits for
/// them.
const MAX_IN_FLIGHT: u64 = 64 << 20;

/// The token of the rate limiter's timer.
const TOKEN_TIMER: u32 = 0;
/// The first token of the disk's descriptors.
const TOKEN_DISK: u32 = 1;

/// A disk that a device serves, and that a snapshot freezes while the device is paused. The lock is
/// held for one call at a time, by the event loop while the machine runs.
pub type SharedDisk = Arc<Mutex<Disk>>;

/// A block device.
pub struct Block {
    disk: SharedDisk,
    state: BlockStateV1,
    config: [u8; CONFIG_BYTES],
    limiter: Option<RateLimiter>,
    active: Option<RequestQueues>,
    /// Whether the driver has flushes, so that a change may be completed before it is durable. It is
    /// decided by the activation.
    writeback: bool,
    in_flight: InFlight,
    /// Whether a request waits until the disk has fewer.
    held_back: bool,
    completions: Vec<Completion>,
}

impl Block {
    /// A new device for `disk`.
    ///
    /// # Errors
    /// [`DeviceError::State`] where `config` is not possible, [`DeviceError::Host`] where there is
    /// no timer.
    pub fn new(disk: SharedDisk, config: &BlockConfig) -> Result<Self, DeviceError> {
        let BlockState::V1(state) = BlockState::fresh(config);
        let state = state.attach(properties(&disk))?;
        let limiter = RateLimiter::new(state.limits, Instant::now())
            .map_err(DEVICE.host_error("make a timer"))?;
        Ok(Self {
            disk,
            config: state.config_space(),
            state,
            limiter,
            active: None,
            writeback: false,
            in_flight: InFlight::default(),
            held_back: false,
            completions: Vec::new(),
        })
    }

    /// The disk, for freezing it while the device is paused.
    pub fn disk(&self) -> &SharedDisk {
        &self.disk
    }

    /// The device's state when it has taken over `saved`. The disk of a saved state must have had
    /// the same size and access.
    fn fitted(&self, saved: &[u8]) -> Result<BlockStateV1, DeviceError> {
        let BlockState::V1(saved) = BlockState::decode(saved)?;
        if saved.queues != self.state.queues {
            return Err(DEVICE.state_error(format_args!(
                "it has {} queues, and this device has {}",
                saved.queues, self.state.queues
            )));
        }
        let saved = saved.attach(properties(&self.disk))?;
        let limits = self.state.limits;
        Ok(BlockStateV1 { limits, ..saved })
    }

    /// The descriptors that are registered in the event loop, with their tokens.
    fn descriptors(&self) -> Vec<(u32, RawFd)> {
        let timer = self.limiter.iter().map(|l| (TOKEN_TIMER, l.as_raw_fd()));
        let fds = lock(&self.disk).wake_fds();
        timer.chain((TOKEN_DISK..).zip(fds)).collect()
    }

    /// Registers the device's descriptors in the event loop.
    fn register(&self) -> Result<(), DeviceError> {
        match &self.active {
            Some(active) => active.register(&self.descriptors(), "wait for the disk"),
            None => Ok(()),
        }
    }

    fn unregister(&self) {
        if let Some(active) = &self.active {
            active.unregister(&self.descriptors());
        }
    }

    /// Takes the requests of the queue `slot`, passes them to the disk, and completes those that
    /// are done.
    fn serve(&mut self, slot: usize) -> Result<(), DeviceError> {
        let mut budget = BUDGET;
        loop {
            let stopped = self.take_requests(slot, &mut budget)?;
            self.poll()?;
            if !self.settle(slot, stopped, &mut budget)? {
                return self.signal();
            }
        }
    }

    fn take_requests(&mut self, slot: usize, budget: &mut Budget) -> Result<Stopped, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Stopped::Empty);
        };
        let capacity = active.queues.len() * usize::from(QUEUE_SIZE);
        let mut submission = Submission {
            slot,
            disk: lock(&self.disk),
            ram: &active.ram,
            in_flight: &mut self.in_flight,
            capacity,
            id: &self.state.id,
            writeback: self.writeback,
        };
        let mut turn = Turn {
            budget,
            limit: self.limiter.as_mut(),
        };
        active.queues[slot].take(&active.ram, &mut turn, &mut submission)
    }

    /// Acts on the reason for which no more requests were taken. Returns whether to take more at
    /// once.
    fn settle(
        &mut self,
        slot: usize,
        stopped: Stopped,
        budget: &mut Budget,
    ) -> Result<bool, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        if stopped != Stopped::Blocked {
            return active.queues[slot].settle(&active.ram, stopped, budget);
        }
        // The disk's next completion continues the work, unless the disk has completed all already.
        if self.in_flight.bytes() > 0 {
            self.held_back = true;
            return Ok(false);
        }
        budget.spend(0);
        Ok(true)
    }

    /// Starts the disk's new requests, and gives the complete ones back to the guest.
    fn poll(&mut self) -> Result<(), DeviceError> {
        let mut completions = std::mem::take(&mut self.completions);
        lock(&self.disk)
            .poll(&mut completions)
            .map_err(DEVICE.host_error("use the disk"))?;
        self.answer_all(&mut completions)?;
        self.completions = completions;
        Ok(())
    }

    /// Waits for all of the disk's requests.
    fn drain(&mut self) -> Result<(), DeviceError> {
        let mut completions = Vec::new();
        // Flushes that follow changes take a further round.
        while self.in_flight.len() > 0 {
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
            if result.is_ok() && self.in_flight.take_flush(tag) {
                lock(&self.disk).submit(tag, Request::Flush);
                flushes = true;
                continue;
            }
            let Some(pending) = self.in_flight.remove(tag) else {
                continue;
            };
            let (code, written) = match &result {
                Ok(()) => (VIRTIO_BLK_S_OK, pending.written),
                Err(error) => (status_of(error), 1),
            };
            write_status(&active.ram, pending.status, code)?;
            active.queues[pending.slot].push_used(&active.ram, pending.head, written)?;
        }
        if flushes {
            // They complete by the disk's descriptors, or at once.
            let mut more = Vec::new();
            lock(&self.disk)
                .poll(&mut more)
                .map_err(DEVICE.host_error("use the disk"))?;
            return self.answer_all(&mut more);
        }
        Ok(())
    }

    fn signal(&mut self) -> Result<(), DeviceError> {
        let mut active = self.active.iter_mut();
        active.try_for_each(RequestQueues::signal)
    }

    fn requeue_all(&self) -> Result<(), DeviceError> {
        self.active.iter().try_for_each(RequestQueues::requeue_all)
    }

    fn slots(&self) -> std::ops::Range<usize> {
        0..self.active.as_ref().map_or(0, |active| active.queues.len())
    }
}

/// Passes the requests of one queue to the disk.
struct Submission<'a> {
    /// The queue's place in the list of active queues.
    slot: usize,
    disk: MutexGuard<'a, Disk>,
    ram: &'a GuestRam,
    in_flight: &'a mut InFlight,
    /// The most requests that the queues can hold.
    capacity: usize,
    id: &'a [u8; ID_BYTES],
    writeback: bool,
}

impl<'m> RequestHandler<'m> for Submission<'_> {
    fn handle(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<Served, DeviceError> {
        let Parsed {
            status,
            request,
            written,
        } = parse(queue, chain)?;
        let (bytes, in_flight) = (request.bytes(), self.in_flight.bytes());
        if in_flight > 0 && in_flight.saturating_add(bytes) > MAX_IN_FLIGHT {
            return Ok(Served::Blocked);
        }
        let (code, written) = match request {
            BlockRequest::Disk(request) => {
                let pending = Pending {
                    slot: self.slot,
                    head: chain.head(),
                    status,
                    written,
                    bytes,
                    flush: !self.writeback && request.changes_disk(),
                };
                return self
                    .submit(pending, request)
                    .map(|()| Served::Kept { bytes });
            }
            BlockRequest::Id(mut room) => {
                let len = room.remaining().min(self.id.len());
                let put = room.write_all(&self.id[..len]);
                put.map_err(|error| queue.driver_error(error))?;
                (VIRTIO_BLK_S_OK, written)
            }
            BlockRequest::Refuse(code) => (code, 1),
        };
        write_status(self.ram, status, code)?;
        Ok(Served::Used { written, bytes })
    }
}

impl Submission<'_> {
    fn submit(&mut self, pending: Pending, request: Request) -> Result<(), DeviceError> {
        if self.in_flight.len() >= self.capacity {
            return Err(DEVICE.driver_error("it has more requests in flight than its queues hold"));
        }
        let tag = self.in_flight.insert(pending);
        self.disk.submit(tag, request);
        Ok(())
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
        self.writeback = activation.features >> VIRTIO_BLK_F_FLUSH & 1 != 0;
        self.active = Some(RequestQueues::new(DEVICE, activation));
        self.register()?;
        // The event loop serves the queues, and not the vCPU thread that runs this: the disk's
        // thread is started by the first request, and inherits its rights from the starting thread.
        self.requeue_all()
    }

    fn notify_queue(&mut self, queue: u16) -> Result<(), DeviceError> {
        let slot = self.active.as_ref().and_then(|it| it.slot_of(queue));
        slot.map_or(Ok(()), |slot| self.serve(slot))
    }

    fn handle_event(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        if token != TOKEN_TIMER {
            self.poll()?;
            if !std::mem::take(&mut self.held_back) {
                return self.signal();
            }
        } else if let Some(limiter) = &mut self.limiter {
            limiter
                .acknowledge()
                .map_err(DEVICE.host_error("read a timer"))?;
        }
        self.slots().try_for_each(|slot| self.serve(slot))
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.drain()?;
        self.held_back = false;
        self.unregister();
        self.signal()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.register()?;
        self.requeue_all()
    }

    fn reset(&mut self) {
        if let Err(error) = self.drain() {
            // The driver is gone, or has broken the rings that completions are written to.
            tracing::debug!(%error, "completions were lost in a reset of a block device");
            let drained = lock(&self.disk).drain(&mut self.completions);
            if let Err(error) = drained {
                tracing::error!(%error, "a disk could not complete its requests");
            }
            self.completions.clear();
        }
        self.in_flight = InFlight::default();
        self.held_back = false;
        self.unregister();
        self.active = None;
    }

    fn queues(&self) -> Vec<(u16, &Queue)> {
        let active = self.active.iter();
        active.flat_map(RequestQueues::indexed).collect()
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        BlockState::V1(self.state.clone()).encode()
    }

    fn check_state(&self, state: &[u8]) -> Result<u64, DeviceError> {
        self.fitted(state).map(|state| state.features())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.state = self.fitted(state)?;
        self.config = self.state.config_space();
        Ok(())
    }
}

impl Drop for Block {
    /// Waits for requests on this device's RAM, because others may keep the disk.
    fn drop(&mut self) {
        self.reset();
    }
}

/// Writes a request's status. Its address was in RAM when the request was parsed.
fn write_status(ram: &GuestRam, status: GuestAddress, code: u32) -> Result<(), DeviceError> {
    ram.write_obj(code as u8, status)
        .map_err(|_| DEVICE.driver_error("the status byte of a request is outside RAM"))
}

fn status_of(error: &io::Error) -> u32 {
    match error.kind() {
        io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
        _ => VIRTIO_BLK_S_IOERR,
    }
}

fn properties(disk: &SharedDisk) -> DiskProperties {
    let disk = lock(disk);
    DiskProperties {
        size: disk.size(),
        read_only: disk.is_read_only(),
        block_size: disk.block_size(),
    }
}

fn lock(disk: &SharedDisk) -> MutexGuard<'_, Disk> {
    // The disk checks its own state, so it can be used after a panic of another holder of the lock.
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}
