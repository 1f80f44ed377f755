//! A queue as a device serves it: the one loop over a queue's requests.
//!
//! [`ServedQueue::serve`] hands validated requests to a [`RequestHandler`] until the queue is
//! empty, the call's [`Budget`] is spent, a rate limit holds the next request back, or the device
//! cannot take more. It turns the driver's notifications off while it looks by itself, and on again
//! (with another look, as a request may have come in between) when the queue is empty. When the
//! budget is spent it requeues the queue, so that other handlers of the event loop get their turn.
//! The meaning of a request is left to the device.
//!
//! Source: VIRTIO 1.3, 2.7 (split virtqueues).

use std::sync::atomic::Ordering;
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::budget::Budget;
use super::chain::{ChainError, DescriptorChain};
use super::{ActiveQueue, DeviceError, DeviceName, GuestRam, Interrupt};
use crate::rate_limit::RateLimiter;

/// What a device did with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The request is finished: the driver gets it back.
    Used {
        /// The bytes that the device wrote into the request.
        written: u32,
        /// The bytes that count towards the budget and the rate limit.
        bytes: u64,
    },
    /// The device keeps the request and gives it back later, or has given it back already, by
    /// [`ServedQueue::push_used`].
    Kept {
        /// The bytes that count towards the budget and the rate limit.
        bytes: u64,
    },
    /// The device did not use the request: it is put back, and the loop goes on.
    Returned,
    /// The device cannot serve the request now: it is put back, and the loop stops.
    Blocked,
}

/// Why a call stopped taking requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The driver has no request waiting. It will notify the device of the next one.
    Empty,
    /// The budget is spent; there may be more requests.
    Budget,
    /// The rate limit holds the next request back until its timer fires.
    Limited,
    /// The device cannot take more requests for now. Notifications stay off.
    Blocked,
}

/// A device's part in serving a queue. A closure that handles requests is one.
pub trait RequestHandler<'m> {
    /// Handles one request. More requests may be taken from `queue`.
    ///
    /// # Errors
    /// An error breaks the device, as in
    /// [`VirtioDevice::notify_queue`](super::VirtioDevice::notify_queue).
    fn handle(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<Served, DeviceError>;

    /// Whether the device would take another request now. If not, the loop stops as
    /// [`Stopped::Blocked`] without a look at the queue.
    fn is_ready(&self) -> bool {
        true
    }

    /// Whether a queue with a spent budget is requeued. A device whose own descriptor reports the
    /// remaining work (a tap that is still readable) needs no second report.
    fn needs_requeue(&self) -> bool {
        true
    }
}

impl<'m, F> RequestHandler<'m> for F
where
    F: FnMut(&mut ServedQueue, &mut DescriptorChain<'m>) -> Result<Served, DeviceError>,
{
    fn handle(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<Served, DeviceError> {
        self(queue, chain)
    }
}

/// What bounds one call.
pub struct Turn<'a> {
    /// The requests and bytes that are left of the call's work.
    pub budget: &'a mut Budget,
    /// The limit on the requests, where there is one.
    pub limit: Option<&'a mut RateLimiter>,
}

impl<'a> Turn<'a> {
    /// A call that only its budget bounds.
    pub fn new(budget: &'a mut Budget) -> Self {
        let limit = None;
        Self { budget, limit }
    }

    fn is_allowed(&mut self, device: DeviceName) -> Result<bool, DeviceError> {
        match &mut self.limit {
            None => Ok(true),
            Some(limit) => limit
                .is_ready(Instant::now())
                .map_err(device.host_error("set the timer of its rate limit")),
        }
    }

    fn charge(&mut self, bytes: u64) {
        self.budget.spend(bytes);
        if let Some(limit) = &mut self.limit {
            limit.charge(bytes);
        }
    }
}

/// A queue that a device serves.
pub struct ServedQueue {
    device: DeviceName,
    index: u16,
    queue: Queue,
    kick: EventFd,
    /// Requests were given back since the last [`ServedQueue::signal`].
    has_used: bool,
}

impl ServedQueue {
    /// Takes over an active queue. `event_idx` tells whether `VIRTIO_RING_F_EVENT_IDX` was agreed
    /// on.
    pub fn new(device: DeviceName, active: ActiveQueue, event_idx: bool) -> Self {
        let mut queue = active.queue;
        queue.set_event_idx(event_idx);
        Self {
            device,
            index: active.index,
            queue,
            kick: active.kick,
            has_used: false,
        }
    }

    /// The queue's index in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The rings with their present positions.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The index and the rings, as [`VirtioDevice::queues`](super::VirtioDevice::queues) wants
    /// them.
    pub fn indexed(&self) -> (u16, &Queue) {
        (self.index, &self.queue)
    }

    /// The eventfd that the driver's notifications are counted in.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Serves the queue until there is a reason to stop, and interrupts the driver if it wants
    /// that.
    ///
    /// # Errors
    /// The handler's, and [`DeviceError`] where the queue or a request breaks the specification.
    pub fn serve<'m>(
        &mut self,
        ram: &'m GuestRam,
        interrupt: &dyn Interrupt,
        turn: &mut Turn<'_>,
        handler: &mut impl RequestHandler<'m>,
    ) -> Result<Stopped, DeviceError> {
        let stopped = self.serve_silently(ram, turn, handler)?;
        self.signal(ram, interrupt)?;
        Ok(stopped)
    }

    /// As [`ServedQueue::serve`], without the interrupt: [`ServedQueue::signal`] follows when
    /// other queues are served as well.
    ///
    /// # Errors
    /// As [`ServedQueue::serve`].
    pub fn serve_silently<'m>(
        &mut self,
        ram: &'m GuestRam,
        turn: &mut Turn<'_>,
        handler: &mut impl RequestHandler<'m>,
    ) -> Result<Stopped, DeviceError> {
        loop {
            let stopped = self.take(ram, turn, handler)?;
            if stopped == Stopped::Budget && !handler.needs_requeue() {
                return Ok(stopped);
            }
            if !self.settle(ram, stopped, turn.budget)? {
                return Ok(stopped);
            }
        }
    }

    /// Takes requests with notifications off. [`ServedQueue::settle`] must follow. A device that
    /// has something to do in between (a disk that starts its requests) calls the two by itself.
    ///
    /// # Errors
    /// As [`ServedQueue::serve`].
    pub fn take<'m>(
        &mut self,
        ram: &'m GuestRam,
        turn: &mut Turn<'_>,
        handler: &mut impl RequestHandler<'m>,
    ) -> Result<Stopped, DeviceError> {
        self.disable_notification(ram)?;
        let mut chain = DescriptorChain::new();
        loop {
            if turn.budget.is_spent() {
                return Ok(Stopped::Budget);
            }
            if !turn.is_allowed(self.device)? {
                return Ok(Stopped::Limited);
            }
            if !handler.is_ready() {
                return Ok(Stopped::Blocked);
            }
            if !self.pop_into(ram, &mut chain)? {
                return Ok(Stopped::Empty);
            }
            match handler.handle(self, &mut chain)? {
                Served::Used { written, bytes } => {
                    turn.charge(bytes);
                    self.push_used(ram, chain.head(), written)?;
                }
                Served::Kept { bytes } => turn.charge(bytes),
                Served::Returned => {
                    turn.budget.spend(0);
                    self.undo_pop(1);
                }
                Served::Blocked => {
                    self.undo_pop(1);
                    return Ok(Stopped::Blocked);
                }
            }
        }
    }

    /// Acts on the reason for which [`ServedQueue::take`] stopped: turns notifications on where
    /// the queue was empty, and requeues it where the budget is spent. Returns `true` where a
    /// request came in between, so that the device must take again.
    ///
    /// # Errors
    /// [`DeviceError`] where the rings or the host fail.
    pub fn settle(
        &mut self,
        ram: &GuestRam,
        stopped: Stopped,
        budget: &mut Budget,
    ) -> Result<bool, DeviceError> {
        match stopped {
            Stopped::Empty => {
                let more = self.enable_notification(ram)?;
                if more {
                    budget.spend(0);
                }
                Ok(more)
            }
            Stopped::Budget => self.requeue().map(|()| false),
            Stopped::Limited | Stopped::Blocked => Ok(false),
        }
    }

    /// The next request, or `None` when the driver has none waiting.
    ///
    /// # Errors
    /// [`DeviceError`] where the rings or the request break the specification.
    pub fn pop<'m>(
        &mut self,
        ram: &'m GuestRam,
    ) -> Result<Option<DescriptorChain<'m>>, DeviceError> {
        let mut chain = DescriptorChain::new();
        Ok(self.pop_into(ram, &mut chain)?.then_some(chain))
    }

    /// Takes the next request into `chain`. Returns `false` when the driver has none waiting.
    ///
    /// # Errors
    /// As [`ServedQueue::pop`].
    pub fn pop_into<'m>(
        &mut self,
        ram: &'m GuestRam,
        chain: &mut DescriptorChain<'m>,
    ) -> Result<bool, DeviceError> {
        let mut chains = self
            .queue
            .iter(ram)
            .map_err(self.device.queue_error(self.index))?;
        let Some(raw) = chains.next() else {
            return Ok(false);
        };
        let loaded = chain.load(ram, raw);
        loaded.map_err(|error: ChainError| self.driver_error(error))?;
        Ok(true)
    }

    /// Puts back the last `count` requests that were taken.
    pub fn undo_pop(&mut self, count: u16) {
        let before = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(before);
    }

    /// Gives a request back to the driver, with `len` bytes written into it.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] where the used ring cannot be written.
    pub fn push_used(&mut self, ram: &GuestRam, head: u16, len: u32) -> Result<(), DeviceError> {
        self.has_used = true;
        self.queue
            .add_used(ram, head, len)
            .map_err(self.device.queue_error(self.index))
    }

    /// Interrupts the driver if it wants to know of what was given back since the last call.
    /// Call it once per batch.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] where the rings cannot be read.
    pub fn signal(&mut self, ram: &GuestRam, interrupt: &dyn Interrupt) -> Result<(), DeviceError> {
        if !std::mem::take(&mut self.has_used) {
            return Ok(());
        }
        let wanted = self
            .queue
            .needs_notification(ram)
            .map_err(self.device.queue_error(self.index))?;
        if wanted {
            interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to notify the device, which will look by itself.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] where the used ring cannot be written.
    pub fn disable_notification(&mut self, ram: &GuestRam) -> Result<(), DeviceError> {
        self.queue
            .disable_notification(ram)
            .map_err(self.device.queue_error(self.index))
    }

    /// Asks the driver to notify the device of the next request. Returns `true` if one came in
    /// between: look again.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] where the rings cannot be reached.
    pub fn enable_notification(&mut self, ram: &GuestRam) -> Result<bool, DeviceError> {
        self.queue
            .enable_notification(ram)
            .map_err(self.device.queue_error(self.index))
    }

    /// The driver's position: the number of requests that it ever queued, wrapping.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] where the rings cannot be read.
    pub fn driver_position(&self, ram: &GuestRam) -> Result<u16, DeviceError> {
        self.queue
            .avail_idx(ram, Ordering::Acquire)
            .map(|position| position.0)
            .map_err(self.device.queue_error(self.index))
    }

    /// Asks for a notification when the driver queues a request beyond those that it queued up to
    /// `position`, whether or not the device has taken those. Returns `true` if that happened
    /// already.
    ///
    /// # Errors
    /// As [`ServedQueue::enable_notification`].
    pub fn enable_notification_beyond(
        &mut self,
        ram: &GuestRam,
        position: u16,
    ) -> Result<bool, DeviceError> {
        // The event index is written from the queue's own position, so move it for the call.
        let own = self.queue.next_avail();
        self.queue.set_next_avail(position);
        let more = self.enable_notification(ram);
        self.queue.set_next_avail(own);
        more
    }

    /// Sets the position in both rings, after something else (vhost) has served the queue.
    pub fn set_position(&mut self, next_avail: u16, next_used: u16) {
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(next_used);
    }

    /// Makes the event loop come back to this queue after other handlers had their turn.
    ///
    /// # Errors
    /// [`DeviceError::Host`] where the eventfd cannot be written.
    pub fn requeue(&self) -> Result<(), DeviceError> {
        let written = self.kick.write(1);
        written.map_err(self.device.host_error("requeue a queue"))
    }

    /// The driver broke the specification on this queue.
    pub fn driver_error(&self, reason: impl std::fmt::Display) -> DeviceError {
        self.device
            .driver_error(format_args!("queue {}: {reason}", self.index))
    }
}

#[cfg(test)]
mod tests;
