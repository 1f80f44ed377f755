//! The network device: Ethernet frames between the guest and a tap of the host.
//!
//! Two data paths serve the queue pairs. With an open `/dev/vhost-net` per pair the host kernel
//! does (`vhost.rs`); without, the event loop does (`queue.rs`). Both move frames without a copy
//! of ours, offer the same features and leave the same state behind, so a device may be saved
//! under one and restored under the other. Control queue, link state and configuration are
//! served here in either case.
//!
//! Taps, bridges and addresses are made by the launcher; this takes queues that are open.
//!
//! Source: VIRTIO 1.3, 5.1 (network device).

mod buffers;
mod control;
mod counters;
mod features;
mod pair;
mod queue;
mod state;
mod tap;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod vhost;

use std::fs::File;
use std::sync::Arc;

use linux_raw_sys::if_tun::{TUN_F_CSUM, TUN_F_USO4, TUN_F_USO6};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

pub use counters::{NetCounts, NetHandle};
pub use state::{MAX_QUEUE_PAIRS, NetConfig, NetState, NetStateV1};
pub use tap::{Port, TAP_IOCTLS, Tap, TapError};

use crate::virtio::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use control::Command;
use counters::Shared;
use features::has;
use pair::{Lent, Pair, Rings};
use queue::{Stopped, broken_rule, host};
use state::refused;
use vhost::VhostNet;

const DEVICE: &str = "net";
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// The device's tokens on the event loop.
mod token {
    pub(super) const LINK: u32 = 0x200;

    pub(super) fn port(pair: u16) -> u32 {
        u32::from(pair)
    }

    pub(super) fn vhost(pair: u16) -> u32 {
        0x100 + u32::from(pair)
    }
}

/// The host's side of a network device, all of it already open.
pub struct NetResources {
    /// One port per queue pair: the queues of one tap.
    pub ports: Vec<Box<dyn Port>>,
    /// One open `/dev/vhost-net` per queue pair, or none for the userspace path.
    pub vhost: Vec<File>,
}

/// A virtio network device.
pub struct Net {
    state: NetStateV1,
    offered: u64,
    pairs: Vec<Pair>,
    shared: Arc<Shared>,
    active: Option<Active>,
}

/// What a driver set up.
struct Active {
    lent: Lent,
    control: Option<ActiveQueue>,
    paused: bool,
}

impl Net {
    /// A device of the given state on the given resources, at boot and at restore alike.
    ///
    /// # Errors
    /// [`DeviceError::State`] where state and resources do not fit each other,
    /// [`DeviceError::Host`] where the kernel refuses a setting.
    pub fn new(resources: NetResources, state: NetState) -> Result<Self, DeviceError> {
        let NetState::V1(mut state) = state;
        state.check()?;
        let NetResources { ports, vhost } = resources;
        let wanted = usize::from(state.queue_pairs);
        if ports.len() != wanted || (!vhost.is_empty() && vhost.len() != wanted) {
            return Err(refused(format!(
                "{wanted} queue pairs, but {} tap queues and {} vhost-net instances",
                ports.len(),
                vhost.len()
            )));
        }
        let offered = match state.offered {
            Some(offered) => offered,
            None => {
                let segments_udp = ports[0]
                    .set_offloads(TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6)
                    .is_ok();
                features::offered(state.queue_pairs, state.mtu.is_some(), segments_udp)
            }
        };
        state.offered = Some(offered);
        ports[0]
            .set_offloads(0)
            .map_err(|error| host("clear the tap's offloads", error))?;
        let mut vhost = vhost.into_iter();
        let pairs = ports
            .into_iter()
            .zip(0..)
            .map(|(port, number)| {
                let vhost = vhost.next().map(VhostNet::new).transpose()?;
                Ok(Pair::new(number, port, vhost))
            })
            .collect::<Result<_, DeviceError>>()?;
        let shared =
            Shared::new(state.link_up).map_err(|error| host("make its link's eventfd", error))?;
        Ok(Self {
            state,
            offered,
            pairs,
            shared,
            active: None,
        })
    }

    /// A handle for the rest of the process: link and counters.
    pub fn handle(&self) -> NetHandle {
        NetHandle(Arc::clone(&self.shared))
    }

    /// Whether the host kernel serves the data queues.
    pub fn uses_vhost(&self) -> bool {
        self.pairs.iter().any(Pair::in_kernel)
    }

    /// The control queue's index, which depends on what was agreed on (5.1.2).
    fn control_index(&self, features: u64) -> Option<u16> {
        if !has(features, VIRTIO_NET_F_CTRL_VQ) {
            None
        } else if has(features, VIRTIO_NET_F_MQ) {
            Some(2 * self.state.queue_pairs)
        } else {
            Some(2)
        }
    }

    fn take_queues(&mut self, queues: Vec<ActiveQueue>, features: u64) -> Option<ActiveQueue> {
        let control_index = self.control_index(features);
        let mut by_index: Vec<Option<ActiveQueue>> = Vec::new();
        by_index.resize_with(2 * self.pairs.len() + 1, || None);
        for queue in queues {
            if let Some(place) = by_index.get_mut(usize::from(queue.index)) {
                *place = Some(queue);
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

    /// Brings every pair into the state that pause, link and driver ask for.
    fn apply(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        let running = !active.paused && self.shared.link_up();
        let several = self.pairs.len() > 1;
        for (number, pair) in self.pairs.iter_mut().enumerate() {
            let used = number < usize::from(self.state.active_pairs);
            if !(used && running) {
                pair.stop(&active.lent)?;
            }
            if several {
                pair.set_attached(used)?;
            }
            if used && running {
                pair.start(&active.lent)?;
            }
        }
        Ok(())
    }

    fn apply_offloads(&self, features: u64) -> Result<(), DeviceError> {
        let wanted = self.state.guest_offloads.unwrap_or(features);
        self.pairs[0]
            .port()
            .set_offloads(features::tap_offloads(wanted))
            .map_err(|error| host("set the tap's offloads", error))
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
        let (ram, features) = (active.lent.ram.clone(), active.lent.features);
        let served = control::serve(&mut control, &ram, |command| {
            self.execute(command, features)
        });
        if let (Ok(moved), Some(active)) = (&served, &self.active) {
            if moved.interrupt {
                active.lent.interrupt.signal_queue(control.index);
            }
            if moved.stopped == Stopped::Budget {
                control
                    .kick
                    .write(1)
                    .map_err(|error| host("kick the control queue", error))?;
            }
        }
        if let Some(active) = &mut self.active {
            active.control = Some(control);
        }
        served.map(drop)
    }

    fn follow_link(&mut self) -> Result<(), DeviceError> {
        // A wake-up that was already taken leaves nothing to read.
        let _ = self.shared.wake().read();
        self.apply()?;
        if self.shared.link_up() != self.state.link_up {
            self.state.link_up = self.shared.link_up();
            if let Some(active) = &self.active {
                active.lent.interrupt.signal_config();
            }
        }
        Ok(())
    }

    fn notify(&mut self, index: u16) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_ref().filter(|active| !active.paused) else {
            return Ok(());
        };
        if self.control_index(active.lent.features) == Some(index) {
            return self.serve_control();
        }
        let Some(pair) = self.pairs.get_mut(usize::from(index / 2)) else {
            return Ok(());
        };
        if index.is_multiple_of(2) {
            pair.receive(&active.lent, &self.shared.counters)
        } else {
            pair.transmit(&active.lent, &self.shared.counters)
        }
    }

    fn event(&mut self, event: u32, ready: EventSet) -> Result<(), DeviceError> {
        if event == token::LINK {
            return self.follow_link();
        }
        let Some(active) = &self.active else {
            return Ok(());
        };
        for (pair, number) in self.pairs.iter_mut().zip(0..) {
            if event == token::port(number) {
                return pair.port_ready(ready, &active.lent, &self.shared.counters);
            }
            if event == token::vhost(number) {
                return Err(broken_rule("vhost-net found a ring or a buffer broken"));
            }
        }
        Ok(())
    }

    /// Leaves nothing waiting in the event loop and nothing running in the kernel.
    fn halt(&mut self) {
        let Some(active) = &self.active else {
            return;
        };
        for pair in &mut self.pairs {
            if let Err(error) = pair.stop(&active.lent) {
                tracing::warn!(%error, "a queue pair did not stop in order");
            }
        }
        // Not there where activation failed half-way.
        let _ = active.lent.events.remove(self.shared.wake());
    }

    /// A device that failed must not be called by its own descriptors again.
    fn halt_on_error(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        result.inspect_err(|_| self.halt())
    }

    fn try_activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            ram,
            queues,
            features,
            interrupt,
            events,
        } = activation;
        if !has(features, VIRTIO_F_VERSION_1) {
            return Err(broken_rule("it did not agree to VIRTIO_F_VERSION_1"));
        }
        let control = self.take_queues(queues, features);
        if !has(features, VIRTIO_NET_F_MQ) {
            self.state.active_pairs = 1;
        }
        self.state.announce &= has(features, VIRTIO_NET_F_GUEST_ANNOUNCE);
        self.active = Some(Active {
            lent: Lent {
                ram,
                features,
                interrupt: Arc::clone(&interrupt),
                events: events.clone(),
            },
            control,
            paused: false,
        });
        events
            .add(self.shared.wake(), token::LINK, EventSet::IN)
            .map_err(|error| host("wait for link changes", error))?;
        self.apply_offloads(features)?;
        self.apply()?;
        self.kick_control()?;
        if self.state.announce {
            interrupt.signal_config();
        }
        Ok(())
    }

    fn kick_control(&self) -> Result<(), DeviceError> {
        let control = self
            .active
            .as_ref()
            .and_then(|active| active.control.as_ref());
        match control {
            Some(control) => control
                .kick
                .write(1)
                .map_err(|error| host("kick the control queue", error)),
            None => Ok(()),
        }
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * self.pairs.len()];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    /// `struct virtio_net_config` as far as the offered features need it (5.1.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut status = 0;
        if self.shared.link_up() {
            status |= VIRTIO_NET_S_LINK_UP as u16;
        }
        if self.state.announce {
            status |= VIRTIO_NET_S_ANNOUNCE as u16;
        }
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.state.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.state.queue_pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.state.mtu.unwrap_or(0).to_le_bytes());
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let known = config.get(from..).unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(known) {
            *to = *from;
        }
    }

    fn in_kernel(&self, queue: u16) -> bool {
        let features = self
            .active
            .as_ref()
            .map_or(0, |active| active.lent.features);
        self.control_index(features) != Some(queue)
            && self
                .pairs
                .get(usize::from(queue / 2))
                .is_some_and(Pair::in_kernel)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let result = self.try_activate(activation);
        self.halt_on_error(result)
    }

    fn notify_queue(&mut self, queue: u16) -> Result<(), DeviceError> {
        let result = self.notify(queue);
        self.halt_on_error(result)
    }

    fn handle_event(&mut self, token: u32, ready: EventSet) -> Result<(), DeviceError> {
        let result = self.event(token, ready);
        self.halt_on_error(result)
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        if let Some(active) = &mut self.active {
            active.paused = true;
        }
        self.apply()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        if let Some(active) = &mut self.active {
            active.paused = false;
        }
        self.apply()?;
        self.kick_control()
    }

    fn reset(&mut self) {
        self.halt();
        self.active = None;
        for pair in &mut self.pairs {
            pair.set_rings(None);
        }
        self.state.active_pairs = 1;
        self.state.guest_offloads = None;
        self.state.announce = false;
    }

    fn queues(&self) -> Vec<(u16, &Queue)> {
        let data = self.pairs.iter().filter_map(Pair::rings);
        let data = data.flat_map(|rings| [&rings.rx, &rings.tx]);
        let control = self
            .active
            .as_ref()
            .and_then(|active| active.control.as_ref());
        data.chain(control)
            .map(|active| (active.index, &active.queue))
            .collect()
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let state = NetStateV1 {
            link_up: self.shared.link_up(),
            // Whoever is built from this wakes up elsewhere: bridges must learn where.
            announce: self.active.is_some(),
            ..self.state.clone()
        };
        NetState::V1(state).encode()
    }
}
