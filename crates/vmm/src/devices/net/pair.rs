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

/// What the transport lent at activation and every pair needs.
pub(super) struct Lent {
    pub(super) ram: GuestRam,
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) events: Registrar,
}

/// What all pairs of a device share on the userspace path.
pub(super) struct Shares<'a> {
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
        /// What is waited for on the port.
        watched: EventSet,
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

    /// Whether vhost serves the pair when it runs.
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

    /// Takes the rings, or takes them away.
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

    /// Sets the pair to work, if it has rings and does not work already.
    pub(super) fn start(&mut self, lent: &Lent) -> Result<(), DeviceError> {
        let (Path::Stopped, Some(rings)) = (&self.path, &self.rings) else {
            return Ok(());
        };
        if let Some(vhost) = &mut self.vhost {
            lent.events
                .add(vhost.errors(), token::vhost(self.number), EventSet::IN)
                .map_err(DEVICE.host_error("wait for vhost-net's errors"))?;
            self.path = Path::Kernel;
            let with = Start {
                ram: &lent.ram,
                features: lent.features,
                interrupt: &*lent.interrupt,
                tap: self.port.file(),
            };
            vhost.start(&rings.rx, &rings.tx, &with)?;
        } else {
            lent.events
                .add(self.port.file(), token::port(self.number), EventSet::IN)
                .map_err(DEVICE.host_error("wait for the tap"))?;
            self.path = Path::Userspace {
                receiver: Receiver::new(features::has(lent.features, VIRTIO_NET_F_MRG_RXBUF)),
                watched: EventSet::IN,
            };
        }
        // A kick may have been lost while nobody listened (or before a restore).
        rings.rx.requeue()?;
        rings.tx.requeue()
    }

    /// Stops work; afterwards the rings are at rest and their positions true.
    pub(super) fn stop(&mut self, lent: &Lent) -> Result<(), DeviceError> {
        match std::mem::replace(&mut self.path, Path::Stopped) {
            Path::Stopped => Ok(()),
            Path::Kernel => {
                let (Some(vhost), Some(rings)) = (&mut self.vhost, &mut self.rings) else {
                    return Ok(());
                };
                let stopped = vhost.stop(&lent.ram, &mut rings.rx, &mut rings.tx);
                let removed = lent
                    .events
                    .remove(vhost.errors())
                    .map_err(DEVICE.host_error("stop waiting for vhost-net's errors"));
                stopped.and(removed)
            }
            Path::Userspace { .. } => lent
                .events
                .remove(self.port.file())
                .map_err(DEVICE.host_error("stop waiting for the tap")),
        }
    }

    /// The port is ready for what is waited for.
    pub(super) fn port_ready(
        &mut self,
        ready: EventSet,
        lent: &Lent,
        shares: &mut Shares<'_>,
    ) -> Result<(), DeviceError> {
        if ready.contains(EventSet::IN) {
            self.receive(lent, shares)?;
        }
        if ready.contains(EventSet::OUT) {
            self.transmit(lent, shares)?;
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
        lent: &Lent,
        shares: &mut Shares<'_>,
    ) -> Result<(), DeviceError> {
        let (Path::Userspace { receiver, .. }, Some(rings)) = (&mut self.path, &mut self.rings)
        else {
            return Ok(());
        };
        let direction = Direction {
            ram: &lent.ram,
            interrupt: &*lent.interrupt,
            port: self.port.file(),
            counters: shares.counters,
            limiter: shares.rx_limiter.as_deref_mut(),
        };
        let stopped = receiver.receive(&mut rings.rx, direction)?;
        // Out of buffers, the tap is left alone until the guest kicks, and at the limit until the
        // timer fires; else its readiness calls again, also for what is left over the budget.
        let more = matches!(stopped, Stopped::Budget | Stopped::Blocked);
        self.watch(lent, EventSet::IN, more)
    }

    /// Moves frames from the guest.
    pub(super) fn transmit(
        &mut self,
        lent: &Lent,
        shares: &mut Shares<'_>,
    ) -> Result<(), DeviceError> {
        let (Path::Userspace { .. }, Some(rings)) = (&self.path, &mut self.rings) else {
            return Ok(());
        };
        let direction = Direction {
            ram: &lent.ram,
            interrupt: &*lent.interrupt,
            port: self.port.file(),
            counters: shares.counters,
            limiter: shares.tx_limiter.as_deref_mut(),
        };
        let stopped = transmit(&mut rings.tx, direction)?;
        self.watch(lent, EventSet::OUT, stopped == Stopped::Blocked)
    }

    fn watch(&mut self, lent: &Lent, what: EventSet, wanted: bool) -> Result<(), DeviceError> {
        let Path::Userspace { watched, .. } = &mut self.path else {
            return Ok(());
        };
        let mut next = *watched;
        next.set(what, wanted);
        if next != *watched {
            lent.events
                .modify(self.port.file(), token::port(self.number), next)
                .map_err(DEVICE.host_error("wait for the tap"))?;
            *watched = next;
        }
        Ok(())
    }
}
