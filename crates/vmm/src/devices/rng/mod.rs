//! Random bytes for the guest: virtio entropy device (VIRTIO 1.3, 5.4), fed by the host kernel's
//! generator.
//!
//! Nothing is kept between requests, so a restored or forked guest gets bytes that no sibling
//! gets. `limit` bounds what a guest may draw; this file is the device.

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
use crate::virtio::ring::{Ring, Segment};
use crate::virtio::{Activation, DeviceError, DeviceName, GuestRam, Interrupt, VirtioDevice};

/// The name that errors give the device.
const DEVICE: DeviceName = DeviceName::new("rng");
const QUEUE_SIZE: u16 = 64;

/// The most bytes that one request gets; a longer one is cut, as the specification allows.
const MAX_REQUEST: usize = 64 << 10;
/// Requests handled before others have their turn.
const BUDGET: usize = 32;

const TOKEN_TIMER: u32 = 0;

struct Active {
    ram: GuestRam,
    requests: Ring,
    interrupt: Arc<dyn Interrupt>,
    events: crate::event_loop::Registrar,
}

/// The entropy device.
pub struct Rng {
    bucket: Option<(Bucket, Timer)>,
    active: Option<Active>,
    paused: bool,
}

impl Rng {
    /// Builds the device; with a `limit` it makes a timer.
    pub fn new(limit: Option<RateLimit>, _state: RngState) -> Result<Self, DeviceError> {
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
            paused: false,
        })
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let result = self.answer_requests();
        // A broken device is not called any more: its timer must not wake the loop for nothing.
        if let (Err(_), Some((_, timer))) = (&result, &self.bucket) {
            timer
                .disarm()
                .map_err(DEVICE.host_error("stop its timer"))?;
        }
        result
    }

    fn answer_requests(&mut self) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut().filter(|_| !self.paused) else {
            return Ok(());
        };
        let ram = &active.ram;
        active.requests.mute(ram)?;
        for handled in 0.. {
            if handled == BUDGET {
                active.requests.again()?;
                break;
            }
            let Some(chain) = active.requests.pop(ram)? else {
                if active.requests.unmute(ram)? {
                    continue;
                }
                break;
            };
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                return Err(active
                    .requests
                    .broken("a request has no room or brings data"));
            }
            let mut len = chain.writable_len().min(MAX_REQUEST);
            if let Some((bucket, timer)) = &mut self.bucket {
                match bucket.take(len as u64, Instant::now()) {
                    Ok(granted) => len = granted as usize,
                    Err(delay) => {
                        active.requests.unpop();
                        timer
                            .arm_once(delay)
                            .map_err(DEVICE.host_error("arm its timer"))?;
                        break;
                    }
                }
            }
            fill(&chain.writable, len).map_err(DEVICE.host_error("draw random bytes"))?;
            active.requests.push_used(ram, chain.head, len as u32)?;
        }
        active.requests.signal(ram, &*active.interrupt)
    }
}

/// Fills the first `len` bytes of `segments`.
fn fill(segments: &[Segment<'_>], len: usize) -> io::Result<()> {
    let mut chunk = [0; 1024];
    let mut left = len;
    for segment in segments {
        let mut rest = segment.slice;
        while left > 0 && !rest.is_empty() {
            let want = left.min(rest.len()).min(chunk.len());
            let flags = rustix::rand::GetRandomFlags::empty();
            let got = match rustix::rand::getrandom(&mut chunk[..want], flags) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            rest.copy_from(&chunk[..got]);
            rest = rest.offset(got).map_err(io::Error::other)?;
            left -= got;
        }
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
        if let Some((_, timer)) = &self.bucket {
            activation
                .events
                .add(timer, TOKEN_TIMER, EventSet::IN)
                .map_err(DEVICE.host_error("watch its timer"))?;
        }
        self.active = Some(Active {
            ram: activation.ram,
            requests: Ring::new(DEVICE, queue, event_idx),
            interrupt: activation.interrupt,
            events: activation.events,
        });
        self.paused = false;
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
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.paused = false;
        self.serve()
    }

    fn reset(&mut self) {
        self.paused = false;
        if let (Some(active), Some((_, timer))) = (self.active.take(), &self.bucket)
            && let Err(error) = active.events.remove(timer)
        {
            tracing::error!(%error, "rng: cannot leave the event loop");
        }
    }

    fn queues(&self) -> Vec<(u16, &Queue)> {
        let active = self.active.iter();
        active.map(|active| active.requests.queue()).collect()
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        RngState::fresh().encode()
    }
}
