//! The balloon device, which takes memory from a running guest and gives it back: virtio-balloon
//! (VIRTIO 1.3, 5.5).
//!
//! - **Balloon**: the host sets a target ([`Balloon::set_target_bytes`]), and the driver fills or
//!   empties the balloon and reports its size. Pages in the balloon are released at once. Pages
//!   that leave it come back at the first touch.
//! - **Reporting**: the driver reports free pages by itself, and they are released.
//! - **Hinting**: on request ([`Balloon::start_hinting`]) the driver names all its free pages and
//!   does not use them until the end ([`Balloon::stop_hinting`]). This is for snapshots.
//! - **Statistics**: the driver sends them as often as the host asks.
//!
//! A released page of a clone comes back with the template's content. The guest has given up the
//! page's content, and could see the template's before. For the same reason
//! `VIRTIO_BALLOON_F_PAGE_POISON` is not offered: it would promise that pages keep a pattern or
//! come back as zeros. A driver whose kernel relies on that (`init_on_free`) then switches
//! reporting off by itself.
//!
//! [`ReleaseRanges`] releases the memory. `queue` has the driver's requests, `stats` the guest's
//! statistics, and this file is the device.

mod backend;
mod queue;
mod state;
mod stats;
#[cfg(test)]
mod tests;

pub use backend::{DiscardRam, GuestRange, ReleaseRanges};
pub use state::{BalloonOffer, BalloonState, SavedBalloon};
pub use stats::BalloonStats;

use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Queue;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::epoll::EventSet;

use self::queue::{Hints, Queues, Role};
use crate::timer::Timer;
use crate::virtio::{Activation, DeviceError, DeviceName, VirtioDevice};

/// The name that errors give the device.
const DEVICE: DeviceName = DeviceName::new("balloon");
const QUEUE_SIZE: u16 = 128;

/// The unit of the balloon, which does not depend on the guest's page size.
const PAGE: u64 = 4096;

/// The features of the rings.
const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// `VIRTIO_BALLOON_F_STATS_VQ`.
const F_STATS: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_FREE_PAGE_HINT`.
const F_HINT: u64 = 1 << 3;
/// `VIRTIO_BALLOON_F_REPORTING`.
const F_REPORTING: u64 = 1 << 5;

/// The hinting command that ends a round, after which the driver may use its pages again.
const HINT_DONE: u32 = 1;
/// The first id of a round of hinting. Lower numbers are commands.
const FIRST_HINT_ROUND: u32 = 2;

const TOKEN_TIMER: u32 = 0;

/// The balloon device, and its control for the host.
pub struct Balloon {
    state: BalloonState,
    release: Box<dyn ReleaseRanges>,
    hints: Option<Hints>,
    stats: Option<(BalloonStats, Instant)>,
    timer: Timer,
    queues: Option<Queues>,
}

impl Balloon {
    /// Builds the device with an empty balloon. This makes a timer.
    pub fn new(release: Box<dyn ReleaseRanges>, offer: BalloonOffer) -> Result<Self, DeviceError> {
        let timer = Timer::new().map_err(DEVICE.host_error("make its timer"))?;
        Ok(Self {
            state: BalloonState::fresh(offer),
            release,
            hints: None,
            stats: None,
            timer,
            queues: None,
        })
    }

    /// Asks the guest to give up `bytes` of its memory in all, rounded down to 4 KiB and held to
    /// the size of RAM. Returns the target that is now set. The guest follows in its own time;
    /// [`Balloon::actual_bytes`] is what it has reached.
    pub fn set_target_bytes(&mut self, bytes: u64) -> u64 {
        let most = match &self.queues {
            Some(queues) => queues.ram.iter().map(|region| region.len() / PAGE).sum(),
            None => u64::from(u32::MAX),
        };
        let pages = (bytes / PAGE).min(most).min(u64::from(u32::MAX)) as u32;
        if pages != self.state.target_pages {
            self.state.target_pages = pages;
            self.change_config();
        }
        self.target_bytes()
    }

    /// The memory that the guest was asked to give up, in bytes.
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.state.target_pages) * PAGE
    }

    /// The memory that the guest reports as given up, in bytes.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.state.actual_pages) * PAGE
    }

    /// The guest's latest statistics and their age; `None` before the first.
    pub fn stats(&self) -> Option<(BalloonStats, Duration)> {
        self.stats.map(|(stats, at)| (stats, at.elapsed()))
    }

    /// Asks for statistics every `interval` (whole milliseconds); zero stops asking.
    pub fn set_stats_interval(&mut self, interval: Duration) -> Result<(), DeviceError> {
        self.state.stats_interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        self.arm_stats()
    }

    /// Asks for statistics once, now. They arrive when the guest has answered.
    pub fn refresh_stats(&mut self) -> Result<(), DeviceError> {
        match &mut self.queues {
            Some(queues) if queues.run_state.is_running() => {
                queues.request_stats(&mut self.state.stats_buffer)
            }
            _ => Ok(()),
        }
    }

    /// Whether the driver can be asked for its free pages.
    pub fn can_hint(&self) -> bool {
        let ring = |queues: &Queues| queues.has(Role::Hint);
        self.queues.as_ref().is_some_and(ring)
    }

    /// Asks the driver for its free pages, which are passed to `sink` as they come. Returns `false`
    /// and does nothing where the driver has no hinting.
    ///
    /// The driver does not use the pages until [`Balloon::stop_hinting`], but may take some back
    /// when memory is short. So a sink that only records them must also track later writes, and a
    /// sink that releases them need not. A round that is in progress is ended.
    pub fn start_hinting(&mut self, sink: Box<dyn ReleaseRanges>) -> bool {
        if !self.can_hint() {
            return false;
        }
        let last = self.state.last_hint_round;
        let round = last
            .checked_add(1)
            .map_or(FIRST_HINT_ROUND, |next| next.max(FIRST_HINT_ROUND));
        self.state.last_hint_round = round;
        self.state.hint_command = round;
        self.hints = Some(Hints::new(round, sink));
        self.change_config();
        true
    }

    /// Whether the driver has named all its free pages since [`Balloon::start_hinting`].
    pub fn hinting_is_complete(&self) -> bool {
        self.hints.as_ref().is_some_and(Hints::is_complete)
    }

    /// Ends a round of hinting, complete or not. The driver may use its pages again.
    pub fn stop_hinting(&mut self) {
        if self.hints.take().is_some() {
            self.state.hint_command = HINT_DONE;
            self.change_config();
        }
    }

    /// Tells the driver to read its configuration space, at once or when the device is resumed.
    fn change_config(&mut self) {
        self.state.config_changed = true;
        self.signal_config_change();
    }

    fn signal_config_change(&mut self) {
        if let Some(queues) = &self.queues
            && queues.run_state.is_running()
            && self.state.config_changed
        {
            queues.interrupt.signal_config();
            self.state.config_changed = false;
        }
    }

    fn register_timer(&self) -> Result<(), DeviceError> {
        if let Some(queues) = &self.queues {
            let added = queues.events.add(&self.timer, TOKEN_TIMER, EventSet::IN);
            added.map_err(DEVICE.host_error("wait for its timer"))?;
        }
        Ok(())
    }

    fn arm_stats(&self) -> Result<(), DeviceError> {
        self.timer
            .arm_every(Duration::from_millis(self.state.stats_interval_ms))
            .map_err(DEVICE.host_error("arm its timer"))
    }

    /// Serves one queue.
    fn serve(&mut self, role: Role) -> Result<(), DeviceError> {
        let Some(queues) = &mut self.queues else {
            return Ok(());
        };
        match role {
            Role::Inflate => queues.inflate(&mut *self.release),
            Role::Deflate => queues.deflate(),
            Role::Stats => {
                if let Some(stats) = queues.take_stats(&mut self.state.stats_buffer)? {
                    self.stats = Some((stats, Instant::now()));
                }
                Ok(())
            }
            Role::Hint => queues.take_hints(self.hints.as_mut()),
            Role::Report => queues.take_reports(&mut *self.release),
        }
    }

    /// Serves all queues, as work may have come while the device was not served.
    fn serve_all(&mut self) -> Result<(), DeviceError> {
        self.signal_config_change();
        Role::ALL.into_iter().try_for_each(|role| self.serve(role))
    }

    fn config(&self) -> [u8; 16] {
        let mut config = [0; 16];
        config[0..4].copy_from_slice(&self.state.target_pages.to_le_bytes());
        config[4..8].copy_from_slice(&self.state.actual_pages.to_le_bytes());
        config[8..12].copy_from_slice(&self.state.hint_command.to_le_bytes());
        config
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> DeviceName {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        RING_FEATURES | self.state.offer.features()
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; Role::ALL.len()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The driver may only write `actual`, and may do so in several accesses.
        let mut config = self.config();
        for (at, &byte) in (0..).zip(data) {
            let place = offset
                .checked_add(at)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(place @ 4..8) = place {
                config[place] = byte;
            }
        }
        let actual = [config[4], config[5], config[6], config[7]];
        self.state.actual_pages = u32::from_le_bytes(actual);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.queues = Some(Queues::new(activation)?);
        self.register_timer()?;
        self.serve_all()
    }

    fn notify_queue(&mut self, queue: u16) -> Result<(), DeviceError> {
        let role = self.queues.as_ref().and_then(|queues| queues.role(queue));
        role.map_or(Ok(()), |role| self.serve(role))
    }

    fn handle_event(&mut self, _token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        let due = self
            .timer
            .take()
            .map_err(DEVICE.host_error("read its timer"))?;
        if due { self.refresh_stats() } else { Ok(()) }
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Every call finishes what it starts: there is nothing to drain.
        if let Some(queues) = &self.queues {
            let removed = queues.events.remove(&self.timer);
            removed.map_err(DEVICE.host_error("stop waiting for its timer"))?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.register_timer()?;
        self.serve_all()
    }

    fn reset(&mut self) {
        if let Some(queues) = self.queues.take() {
            // In a pause it is not registered.
            let _ = queues.events.remove(&self.timer);
        }
        self.hints = None;
        self.stats = None;
        // The next driver starts with an empty balloon and reads the target by itself.
        self.state.actual_pages = 0;
        self.state.hint_command = 0;
        self.state.stats_buffer = None;
        self.state.config_changed = false;
    }

    fn queues(&self) -> Vec<(u16, &Queue)> {
        self.queues.as_ref().map_or_else(Vec::new, Queues::list)
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        self.state.encode()
    }

    fn check_state(&self, state: &[u8]) -> Result<u64, DeviceError> {
        let state = BalloonState::decode(state)?;
        Ok(RING_FEATURES | state.offer.features())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.state = BalloonState::decode(state)?;
        if self.state.hint_command >= FIRST_HINT_ROUND {
            // The round's requester does not exist any more, so the driver must not keep its pages
            // back.
            self.state.hint_command = HINT_DONE;
            self.state.config_changed = true;
        }
        self.arm_stats()
    }
}
