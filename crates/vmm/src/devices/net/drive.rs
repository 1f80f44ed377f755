//! The device's work while it is active: it takes the queues, serves kicks and events, and starts
//! and stops queue pairs as pauses, the link and the driver demand.

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::epoll::EventSet;

use super::control::{self, Command};
use super::features::{self, has};
use super::pair::{DriverContext, QueuePairShared, Rings};
use super::{Active, DEVICE, Net, token};
use crate::virtio::{Activation, ActiveQueue, DeviceError, ServedQueue};

impl Net {
    /// The control queue's index, which depends on what was agreed on (5.1.2).
    pub(super) fn control_index(&self, features: u64) -> Option<u16> {
        if !has(features, VIRTIO_NET_F_CTRL_VQ) {
            None
        } else if has(features, VIRTIO_NET_F_MQ) {
            Some(2 * self.state.queue_pairs)
        } else {
            Some(2)
        }
    }

    fn take_queues(&mut self, queues: Vec<ActiveQueue>, features: u64) -> Option<ServedQueue> {
        let control_index = self.control_index(features);
        let mut by_index: Vec<Option<ServedQueue>> = Vec::new();
        by_index.resize_with(2 * self.pairs.len() + 1, || None);
        let event_idx = has(features, VIRTIO_RING_F_EVENT_IDX);
        for queue in queues {
            if let Some(place) = by_index.get_mut(usize::from(queue.index)) {
                *place = Some(ServedQueue::new(DEVICE, queue, event_idx));
            }
        }
        let control = control_index.and_then(|index| by_index[usize::from(index)].take());
        let usable = if has(features, VIRTIO_NET_F_MQ) {
            self.pairs.len()
        } else {
            1
        };
        for (number, pair) in self.pairs.iter_mut().enumerate().take(usable) {
            let (rx, tx) = (by_index[2 * number].take(), by_index[2 * number + 1].take());
            pair.set_rings(rx.zip(tx).map(|(rx, tx)| Rings { rx, tx }));
        }
        control
    }

    /// Stops every pair.
    pub(super) fn stop_pairs(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        let mut pairs = self.pairs.iter_mut();
        pairs.try_for_each(|pair| pair.stop(&active.context))
    }

    /// Starts and stops the pairs of a running device, and steers frames to them, as the link and
    /// the driver demand.
    pub(super) fn apply(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        let running = self.shared.link_up();
        let several = self.pairs.len() > 1;
        for (number, pair) in self.pairs.iter_mut().enumerate() {
            let used = number < usize::from(self.state.active_pairs);
            if !(used && running) {
                pair.stop(&active.context)?;
            }
            if several {
                pair.set_attached(used)?;
            }
            if used && running {
                pair.start(&active.context)?;
            }
        }
        Ok(())
    }

    fn apply_offloads(&self, features: u64) -> Result<(), DeviceError> {
        let wanted = self.state.guest_offloads.unwrap_or(features);
        self.pairs[0]
            .port()
            .set_offloads(features::tap_offloads(wanted))
            .map_err(DEVICE.host_error("set the tap's offloads"))
    }

    fn execute(&mut self, command: Command, features: u64) -> Result<bool, DeviceError> {
        match command {
            Command::AnnounceAck => {
                self.state.announce = false;
                Ok(true)
            }
            Command::SetQueuePairs(pairs) => {
                let usable = self.pairs.iter().take_while(|pair| pair.rings().is_some());
                if pairs == 0 || usize::from(pairs) > usable.count() {
                    return Ok(false);
                }
                self.state.active_pairs = pairs;
                self.apply().map(|()| true)
            }
            Command::SetGuestOffloads(offloads) => {
                if offloads & !(features & features::GUEST_OFFLOADS) != 0 {
                    return Ok(false);
                }
                self.state.guest_offloads = Some(offloads);
                self.apply_offloads(features).map(|()| true)
            }
        }
    }

    fn serve_control(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(mut control) = active.control.take() else {
            return Ok(());
        };
        let (ram, features) = (active.context.ram.clone(), active.context.features);
        let interrupt = Arc::clone(&active.context.interrupt);
        let served = control::serve(&mut control, &ram, &*interrupt, |command| {
            self.execute(command, features)
        });
        if let Some(active) = &mut self.active {
            active.control = Some(control);
        }
        served
    }

    fn apply_link_change(&mut self) -> Result<(), DeviceError> {
        // There is nothing to read where the event was handled before.
        let _ = self.shared.link_changed().read();
        self.apply()?;
        if self.shared.link_up() != self.state.link_up {
            self.state.link_up = self.shared.link_up();
            if let Some(active) = &self.active {
                active.context.interrupt.signal_config();
            }
        }
        Ok(())
    }

    pub(super) fn notify(&mut self, index: u16) -> Result<(), DeviceError> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        if self.control_index(active.context.features) == Some(index) {
            return self.serve_control();
        }
        let Some(pair) = self.pairs.get_mut(usize::from(index / 2)) else {
            return Ok(());
        };
        let mut shared = QueuePairShared {
            counters: &self.shared.counters,
            rx_limiter: self.rx_limiter.as_mut(),
            tx_limiter: self.tx_limiter.as_mut(),
        };
        if index.is_multiple_of(2) {
            pair.receive(&active.context, &mut shared)
        } else {
            pair.transmit(&active.context, &mut shared)
        }
    }

    pub(super) fn event(&mut self, event: u32, ready: EventSet) -> Result<(), DeviceError> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        if event == token::LINK {
            return self.apply_link_change();
        }
        let mut shared = QueuePairShared {
            counters: &self.shared.counters,
            rx_limiter: self.rx_limiter.as_mut(),
            tx_limiter: self.tx_limiter.as_mut(),
        };
        let fired = match event {
            token::RX_LIMIT => shared.rx_limiter.as_mut(),
            token::TX_LIMIT => shared.tx_limiter.as_mut(),
            _ => None,
        };
        if let Some(limiter) = fired {
            limiter
                .acknowledge()
                .map_err(DEVICE.host_error("read the timer of its rate limit"))?;
        }
        for (pair, number) in self.pairs.iter_mut().zip(0..) {
            if event == token::RX_LIMIT {
                pair.receive(&active.context, &mut shared)?;
            } else if event == token::TX_LIMIT {
                pair.transmit(&active.context, &mut shared)?;
            } else if event == token::port(number) {
                return pair.port_ready(ready, &active.context, &mut shared);
            } else if event == token::vhost(number) && pair.vhost_has_failed() {
                return Err(DEVICE.driver_error("vhost-net found a ring or a buffer broken"));
            }
        }
        Ok(())
    }

    /// Registers the eventfd of the link and the timers of the rate limits.
    pub(super) fn listen(&self) -> Result<(), DeviceError> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        let events = &active.context.events;
        let wait = DEVICE.host_error("wait for its link and limits");
        events
            .add(self.shared.link_changed(), token::LINK, EventSet::IN)
            .map_err(wait)?;
        let limiters = [
            (&self.rx_limiter, token::RX_LIMIT),
            (&self.tx_limiter, token::TX_LIMIT),
        ];
        for (limiter, token) in limiters {
            if let Some(limiter) = limiter {
                events.add(limiter, token, EventSet::IN).map_err(wait)?;
            }
        }
        Ok(())
    }

    /// Unregisters them, because nobody takes their events during a pause.
    pub(super) fn stop_listening(&self) {
        let Some(active) = &self.active else {
            return;
        };
        // Descriptors that are not registered need no removal.
        let _ = active.context.events.remove(self.shared.link_changed());
        for limiter in [&self.rx_limiter, &self.tx_limiter].into_iter().flatten() {
            let _ = active.context.events.remove(limiter);
        }
    }

    /// Stops all pairs and unregisters all descriptors.
    pub(super) fn halt(&mut self) {
        let Some(active) = &self.active else {
            return;
        };
        for pair in &mut self.pairs {
            if let Err(error) = pair.stop(&active.context) {
                tracing::warn!(%error, "a queue pair could not be stopped");
            }
        }
        self.stop_listening();
    }

    /// Stops a device that has failed, so that its descriptors do not keep the event loop busy.
    pub(super) fn halt_on_error(
        &mut self,
        result: Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        result.inspect_err(|_| self.halt())
    }

    pub(super) fn try_activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            ram,
            queues,
            features,
            interrupt,
            events,
            ..
        } = activation;
        if !has(features, VIRTIO_F_VERSION_1) {
            return Err(DEVICE.driver_error("it did not agree to VIRTIO_F_VERSION_1"));
        }
        let control = self.take_queues(queues, features);
        if !has(features, VIRTIO_NET_F_MQ) {
            self.state.active_pairs = 1;
        }
        self.state.announce &= has(features, VIRTIO_NET_F_GUEST_ANNOUNCE);
        self.active = Some(Active {
            context: DriverContext {
                ram,
                features,
                interrupt: Arc::clone(&interrupt),
                events,
            },
            control,
        });
        self.listen()?;
        self.apply_offloads(features)?;
        self.apply()?;
        self.kick_control()?;
        if self.state.announce {
            interrupt.signal_config();
        }
        Ok(())
    }

    pub(super) fn kick_control(&self) -> Result<(), DeviceError> {
        let control = self
            .active
            .as_ref()
            .and_then(|active| active.control.as_ref());
        match control {
            Some(control) => control.requeue(),
            None => Ok(()),
        }
    }
}
