//! The network device: Ethernet frames between the guest and a tap of the host.
//!
//! Two data paths serve the queue pairs: the host kernel, with an open `/dev/vhost-net` per pair
//! (`vhost.rs`), or the event loop (`queue.rs`). Neither path copies frames in the VMM. Both offer
//! the same features and have the same state, so a device may be saved with one path and restored
//! with the other. Control queue, link state and configuration are served here in either case.
//!
//! The launcher makes taps, bridges and addresses; this device gets queues of a tap that are open.
//!
//! Source: VIRTIO 1.3, 5.1 (network device).

mod control;
mod counters;
mod drive;
mod features;
mod iovec;
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
use std::time::Instant;

use linux_raw_sys::if_tun::{TUN_F_CSUM, TUN_F_USO4, TUN_F_USO6};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

pub use counters::{NetCounts, NetHandle};
pub use state::{MAX_QUEUE_PAIRS, NetConfig, NetState, NetStateV1};
pub use tap::{Port, TAP_IOCTLS, Tap, TapError};

use crate::rate_limit::{RateLimiter, RateLimits};
use crate::virtio::{Activation, DeviceError, DeviceName, ServedQueue, VirtioDevice};
use counters::Shared;
use pair::{DriverContext, Pair};
use vhost::VhostNet;

const DEVICE: DeviceName = DeviceName::new("net");
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// The device's tokens on the event loop.
mod token {
    pub(super) const LINK: u32 = 0x200;
    pub(super) const RX_LIMIT: u32 = 0x201;
    pub(super) const TX_LIMIT: u32 = 0x202;

    pub(super) fn port(pair: u16) -> u32 {
        u32::from(pair)
    }

    pub(super) fn vhost(pair: u16) -> u32 {
        0x100 + u32::from(pair)
    }
}

/// The host's resources of a network device, which are open already.
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
    rx_limiter: Option<RateLimiter>,
    tx_limiter: Option<RateLimiter>,
    active: Option<Active>,
}

/// The resources of the activation.
struct Active {
    context: DriverContext,
    control: Option<ServedQueue>,
}

impl Net {
    /// A new device on the given resources.
    ///
    /// # Errors
    /// [`DeviceError::State`] where configuration and resources do not fit each other,
    /// [`DeviceError::Host`] where the kernel refuses a setting.
    pub fn new(resources: NetResources, config: NetConfig) -> Result<Self, DeviceError> {
        let NetState::V1(mut state) = NetState::fresh(config);
        state.check()?;
        let NetResources { ports, vhost } = resources;
        let wanted = usize::from(state.queue_pairs);
        if ports.len() != wanted || (!vhost.is_empty() && vhost.len() != wanted) {
            return Err(DEVICE.state_error(format_args!(
                "{wanted} queue pairs, but {} tap queues and {} vhost-net instances",
                ports.len(),
                vhost.len()
            )));
        }
        if !vhost.is_empty() && state.limits != RateLimits::default() {
            return Err(DEVICE.state_error("it has rate limits, which vhost-net does not keep"));
        }
        let segments_udp = ports[0]
            .set_offloads(TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6)
            .is_ok();
        let offered = features::offered(state.queue_pairs, state.mtu.is_some(), segments_udp);
        state.offered = Some(offered);
        ports[0]
            .set_offloads(0)
            .map_err(DEVICE.host_error("clear the tap's offloads"))?;
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
            Shared::new(state.link_up).map_err(DEVICE.host_error("make its link's eventfd"))?;
        let limiter = || {
            RateLimiter::new(state.limits, Instant::now())
                .map_err(DEVICE.host_error("make the timer of its rate limit"))
        };
        Ok(Self {
            rx_limiter: limiter()?,
            tx_limiter: limiter()?,
            state,
            offered,
            pairs,
            shared,
            active: None,
        })
    }

    /// A handle for the link and the counters, for the rest of the process.
    pub fn handle(&self) -> NetHandle {
        NetHandle(Arc::clone(&self.shared))
    }

    /// The device's state when it has taken over `saved`. The features that the guest was offered
    /// stay, also those that this host's taps do not have: a driver that uses them is refused by
    /// the tap when it is activated.
    fn fitted(&self, saved: &[u8]) -> Result<NetStateV1, DeviceError> {
        let NetState::V1(saved) = NetState::decode(saved)?;
        if saved.queue_pairs != self.state.queue_pairs {
            return Err(DEVICE.state_error(format_args!(
                "it has {} queue pairs, and this device has {}",
                saved.queue_pairs, self.state.queue_pairs
            )));
        }
        Ok(NetStateV1 {
            mac: self.state.mac,
            limits: self.state.limits,
            offered: Some(saved.offered.unwrap_or(self.offered)),
            ..saved
        })
    }

    /// Whether the host kernel serves the data queues.
    pub fn uses_vhost(&self) -> bool {
        self.pairs.iter().any(Pair::in_kernel)
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> DeviceName {
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
            .map_or(0, |active| active.context.features);
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
        self.stop_listening();
        self.stop_pairs()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.listen()?;
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
        data.chain(control).map(ServedQueue::indexed).collect()
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let state = NetStateV1 {
            link_up: self.shared.link_up(),
            // A device that is built from this state may be on another host, and bridges must learn
            // of that.
            announce: self.active.is_some(),
            ..self.state.clone()
        };
        NetState::V1(state).encode()
    }

    fn check_state(&self, state: &[u8]) -> Result<u64, DeviceError> {
        let state = self.fitted(state)?;
        Ok(state.offered.unwrap_or(self.offered))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.state = self.fitted(state)?;
        self.offered = self.state.offered.unwrap_or(self.offered);
        self.shared.restore_link(self.state.link_up);
        Ok(())
    }
}
