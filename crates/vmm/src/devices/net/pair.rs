//! A queue pair: its port, its rings, and which of the two data paths serves it.

use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::counters::Counters;
use super::queue::{Direction, Receiver, transmit};
use super::tap::Port;
use super::vhost::{Start, VhostNet};
use super::{DEVICE, features, token};
use crate::event_loop::Registrar;
use crate::rate_limit::RateLimiter;
use crate::virtio::{DeviceError, GuestRam, Interrupt, ServedQueue, Stopped};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

/// The resources of the activation that every pair needs.
pub(super) struct DriverContext {
    pub(super) ram: GuestRam,
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) events: Registrar,
}

/// The counters and rate limits that all pairs of a device share on the userspace path.
pub(super) struct QueuePairShared<'a> {
    pub(super) counters: &'a Counters,
    pub(super) rx_limiter: Option<&'a mut RateLimiter>,
    pub(super) tx_limiter: Option<&'a mut RateLimiter>,
}

/// The rings of a pair.
pub(super) struct Rings {
    pub(super) rx: ServedQueue,
    pub(super) tx: ServedQueue,
}

/// How a running pair is served.
enum Path {
    Stopped,
    Kernel,
    Userspace {
        receiver: Receiver,
        /// The events that are waited for on the port.
        interest: EventSet,
    },
}

/// One queue pair.
pub(super) struct Pair {
    number: u16,
    port: Box<dyn Port>,
    /// Whether frames are steered here, where the port has several queues.
    attached: bool,
    vhost: Option<VhostNet>,
    rings: Option<Rings>,
    path: Path,
}

impl Pair {
    pub(super) fn new(number: u16, port: Box<dyn Port>, vhost: Option<VhostNet>) -> Self {
        Self {
            number,
            port,
            attached: true,
            vhost,
            rings: None,
            path: Path::Stopped,
        }
    }

    pub(super) fn port(&self) -> &dyn Port {
        &*self.port
    }

    /// Whether vhost serves the pair.
    pub(super) fn in_kernel(&self) -> bool {
        self.vhost.is_some()
    }

    /// Whether vhost has found a ring broken since it was started.
    pub(super) fn vhost_has_failed(&self) -> bool {
        let vhost = self.vhost.as_ref();
        vhost.is_some_and(|vhost| vhost.errors().read().is_ok())
    }

    pub(super) fn rings(&self) -> Option<&Rings> {
        self.rings.as_ref()
    }

    /// Sets or removes the rings.
    pub(super) fn set_rings(&mut self, rings: Option<Rings>) {
        self.rings = rings;
    }

    /// Steers frames to this queue of the port, or away from it.
    pub(super) fn set_attached(&mut self, attached: bool) -> Result<(), DeviceError> {
        if self.attached != attached {
            self.port
                .set_attached(attached)
                .map_err(DEVICE.host_error("attach or detach a queue of the tap"))?;
            self.attached = attached;
        }
        Ok(())
    }

    /// Starts the pair, if it has rings and is stopped.
    pub(super) fn start(&mut self, context: &DriverContext) -> Result<(), DeviceError> {
        let (Path::Stopped, Some(rings)) = (&self.path, &self.rings) else {
            return Ok(());
        };
        if let Some(vhost) = &mut self.vhost {
            context
                .events
                .add(vhost.errors(), token::vhost(self.number), EventSet::IN)
                .map_err(DEVICE.host_error("wait for vhost-net's errors"))?;
            self.path = Path::Kernel;
            let with = Start {
                ram: &context.ram,
                features: context.features,
                interrupt: &*context.interrupt,
                tap: self.port.file(),
            };
            vhost.start(&rings.rx, &rings.tx, &with)?;
        } else {
            context
                .events
                .add(self.port.file(), token::port(self.number), EventSet::IN)
                .map_err(DEVICE.host_error("wait for the tap"))?;
            self.path = Path::Userspace {
                receiver: Receiver::new(features::has(context.features, VIRTIO_NET_F_MRG_RXBUF)),
                interest: EventSet::IN,
            };
        }
        // A kick may have been lost while the pair was stopped (or before a restore).
        rings.rx.requeue()?;
        rings.tx.requeue()
    }

    /// Stops the pair. Afterwards the rings are at rest and their positions are true.
    pub(super) fn stop(&mut self, context: &DriverContext) -> Result<(), DeviceError> {
        match std::mem::replace(&mut self.path, Path::Stopped) {
            Path::Stopped => Ok(()),
            Path::Kernel => {
                let (Some(vhost), Some(rings)) = (&mut self.vhost, &mut self.rings) else {
                    return Ok(());
                };
                let stopped = vhost.stop(&context.ram, &mut rings.rx, &mut rings.tx);
                let removed = context
                    .events
                    .remove(vhost.errors())
                    .map_err(DEVICE.host_error("stop waiting for vhost-net's errors"));
                stopped.and(removed)
            }
            Path::Userspace { .. } => context
                .events
                .remove(self.port.file())
                .map_err(DEVICE.host_error("stop waiting for the tap")),
        }
    }

    /// Handles an event of the port.
    pub(super) fn port_ready(
        &mut self,
        ready: EventSet,
        context: &DriverContext,
        shared: &mut QueuePairShared<'_>,
    ) -> Result<(), DeviceError> {
        if ready.contains(EventSet::IN) {
            self.receive(context, shared)?;
        }
        if ready.contains(EventSet::OUT) {
            self.transmit(context, shared)?;
        }
        if ready.intersects(EventSet::ERROR | EventSet::HANG_UP)
            && !matches!(self.path, Path::Stopped)
        {
            let gone = std::io::Error::from_raw_os_error(libc::ENODEV);
            return Err(DEVICE.host_error("use the tap, which is gone")(gone));
        }
        Ok(())
    }

    /// Moves frames to the guest.
    pub(super) fn receive(
        &mut self,
        context: &DriverContext,
        shared: &mut QueuePairShared<'_>,
    ) -> Result<(), DeviceError> {
        let (Path::Userspace { receiver, .. }, Some(rings)) = (&mut self.path, &mut self.rings)
        else {
            return Ok(());
        };
        let direction = Direction {
            ram: &context.ram,
            interrupt: &*context.interrupt,
            port: self.port.file(),
            counters: shared.counters,
            limiter: shared.rx_limiter.as_deref_mut(),
        };
        let stopped = receiver.receive(&mut rings.rx, direction)?;
        // Without buffers the tap is not waited for until the guest kicks, and at the limit not
        // until the timer fires. Otherwise a readable tap calls again, also for frames beyond the
        // budget.
        let more = matches!(stopped, Stopped::Budget | Stopped::Blocked);
        self.set_interest(context, EventSet::IN, more)
    }

    /// Moves frames from the guest.
    pub(super) fn transmit(
        &mut self,
        context: &DriverContext,
        shared: &mut QueuePairShared<'_>,
    ) -> Result<(), DeviceError> {
        let (Path::Userspace { .. }, Some(rings)) = (&self.path, &mut self.rings) else {
            return Ok(());
        };
        let direction = Direction {
            ram: &context.ram,
            interrupt: &*context.interrupt,
            port: self.port.file(),
            counters: shared.counters,
            limiter: shared.tx_limiter.as_deref_mut(),
        };
        let stopped = transmit(&mut rings.tx, direction)?;
        self.set_interest(context, EventSet::OUT, stopped == Stopped::Blocked)
    }

    fn set_interest(
        &mut self,
        context: &DriverContext,
        what: EventSet,
        wanted: bool,
    ) -> Result<(), DeviceError> {
        let Path::Userspace { interest, .. } = &mut self.path else {
            return Ok(());
        };
        let mut next = *interest;
        next.set(what, wanted);
        if next != *interest {
            context
                .events
                .modify(self.port.file(), token::port(self.number), next)
                .map_err(DEVICE.host_error("wait for the tap"))?;
            *interest = next;
        }
        Ok(())
    }
}
