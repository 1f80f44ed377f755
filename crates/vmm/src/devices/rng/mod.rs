//! The entropy device (VIRTIO 1.3, 5.4), which gives the guest random bytes of the host kernel's
//! generator.
//!
//! No bytes are kept between requests, so a restored or forked guest gets bytes that no other guest
//! gets. `limit` bounds the bytes that a guest may draw; this file is the device.

mod limit;
mod state;
#[cfg(test)]
mod tests;

pub use limit::RateLimit;
pub use state::{RngState, SavedRng};

use std::io;
use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

use self::limit::Bucket;
use crate::timer::Timer;
use crate::virtio::budget::Budget;
use crate::virtio::{
    Activation, DescriptorChain, DeviceError, DeviceName, GuestRam, Interrupt, Served, ServedQueue,
    Turn, VirtioDevice, Writer,
};

/// The name that errors give the device.
const DEVICE: DeviceName = DeviceName::new("rng");
const QUEUE_SIZE: u16 = 64;

/// The most bytes that one request gets. A longer request is filled in part, as the specification
/// allows.
const MAX_REQUEST: usize = 64 << 10;
/// The requests that one call serves.
const BUDGET: Budget = Budget::new(32, u64::MAX);

const TOKEN_TIMER: u32 = 0;

struct Active {
    ram: GuestRam,
    requests: ServedQueue,
    interrupt: Arc<dyn Interrupt>,
    events: crate::event_loop::Registrar,
}

/// The entropy device.
pub struct Rng {
    bucket: Option<(Bucket, Timer)>,
    active: Option<Active>,
}

impl Rng {
    /// Builds the device. With a `limit` this makes a timer.
    pub fn new(limit: Option<RateLimit>) -> Result<Self, DeviceError> {
        let bucket = match limit {
            Some(limit) => {
                let timer = Timer::new().map_err(DEVICE.host_error("make its timer"))?;
                Some((Bucket::full(limit, Instant::now()), timer))
            }
            None => None,
        };
        Ok(Self {
            bucket,
            active: None,
        })
    }

    fn register_timer(&self) -> Result<(), DeviceError> {
        if let (Some(active), Some((_, timer))) = (&self.active, &self.bucket) {
            let added = active.events.add(timer, TOKEN_TIMER, EventSet::IN);
            added.map_err(DEVICE.host_error("wait for its timer"))?;
        }
        Ok(())
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let result = self.answer_requests();
        // A broken device is not called any more, so its timer must not keep the event loop busy.
        if let (Err(_), Some((_, timer))) = (&result, &self.bucket) {
            timer
                .disarm()
                .map_err(DEVICE.host_error("stop its timer"))?;
        }
        result
    }

    fn answer_requests(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let bucket = &mut self.bucket;
        let mut answer = |queue: &mut ServedQueue, chain: &mut DescriptorChain<'_>| {
            answer_request(queue, chain, bucket.as_mut())
        };
        let mut budget = BUDGET;
        let (ram, interrupt) = (&active.ram, &*active.interrupt);
        active
            .requests
            .serve(ram, interrupt, &mut Turn::new(&mut budget), &mut answer)?;
        Ok(())
    }
}

/// Fills a request with as many random bytes as its guest may draw now.
fn answer_request(
    queue: &ServedQueue,
    chain: &DescriptorChain<'_>,
    bucket: Option<&mut (Bucket, Timer)>,
) -> Result<Served, DeviceError> {
    if chain.readable_len() > 0 || chain.writable_len() == 0 {
        return Err(queue.driver_error("a request has no writable buffer, or a readable one"));
    }
    let wanted = chain.writable_len().min(MAX_REQUEST);
    let Some(len) = draw(wanted, bucket)? else {
        return Ok(Served::Blocked);
    };
    fill(chain.writer(), len).map_err(DEVICE.host_error("draw random bytes"))?;
    Ok(Served::Used {
        written: len as u32,
        bytes: len as u64,
    })
}

/// The bytes that the limit grants of `wanted`, or `None` until the timer fires.
fn draw(wanted: usize, bucket: Option<&mut (Bucket, Timer)>) -> Result<Option<usize>, DeviceError> {
    let Some((bucket, timer)) = bucket else {
        return Ok(Some(wanted));
    };
    match bucket.take(wanted as u64, Instant::now()) {
        Ok(granted) => Ok(Some(granted as usize)),
        Err(delay) => {
            let armed = timer.arm_once(delay);
            armed.map_err(DEVICE.host_error("arm its timer"))?;
            Ok(None)
        }
    }
}

/// Fills the first `len` bytes of the room.
fn fill(room: Writer<'_, '_>, len: usize) -> io::Result<()> {
    let mut chunk = [0; 1024];
    let (mut room, _) = room.split_at(len).map_err(io::Error::other)?;
    while room.remaining() > 0 {
        let want = room.remaining().min(chunk.len());
        let flags = rustix::rand::GetRandomFlags::empty();
        let got = match rustix::rand::getrandom(&mut chunk[..want], flags) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?,
        };
        room.write_all(&chunk[..got]).map_err(io::Error::other)?;
    }
    Ok(())
}

impl VirtioDevice for Rng {
    fn name(&self) -> DeviceName {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_bytes(&[], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let event_idx = activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let Some(queue) = activation.queues.into_iter().next() else {
            return Err(DEVICE.driver_error("it did not set up the queue"));
        };
        self.active = Some(Active {
            ram: activation.ram,
            requests: ServedQueue::new(DEVICE, queue, event_idx),
            interrupt: activation.interrupt,
            events: activation.events,
        });
        self.register_timer()?;
        self.serve()
    }

    fn notify_queue(&mut self, _queue: u16) -> Result<(), DeviceError> {
        self.serve()
    }

    fn handle_event(&mut self, _token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        if let Some((_, timer)) = &self.bucket {
            timer.take().map_err(DEVICE.host_error("read its timer"))?;
        }
        self.serve()
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Every call finishes what it starts: there is nothing to drain.
        if let (Some(active), Some((_, timer))) = (&self.active, &self.bucket) {
            let removed = active.events.remove(timer);
            removed.map_err(DEVICE.host_error("stop waiting for its timer"))?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.register_timer()?;
        self.serve()
    }

    fn reset(&mut self) {
        if let (Some(active), Some((_, timer))) = (self.active.take(), &self.bucket) {
            // In a pause it is not registered.
            let _ = active.events.remove(timer);
        }
    }

    fn queues(&self) -> Vec<(u16, &Queue)> {
        let active = self.active.iter();
        active.map(|active| active.requests.indexed()).collect()
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        RngState::fresh().encode()
    }

    fn check_state(&self, state: &[u8]) -> Result<u64, DeviceError> {
        RngState::decode(state).map(|_empty| self.features())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        RngState::decode(state).map(drop)
    }
}
