//! The driver's requests on the five queues (VIRTIO 1.3, 5.5.2 and 5.5.6).
//!
//! Page numbers and ranges come from the guest, and only those in RAM are ever passed on.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::backend::{GuestRange, ReleaseRanges};
use super::stats::{BalloonStats, MAX_PAIRS, PAIR};
use super::{DEVICE, F_HINT, F_REPORTING, F_STATS, PAGE};
use crate::event_loop::Registrar;
use crate::virtio::budget::Budget;
use crate::virtio::chain::Segment;
use crate::virtio::{
    Activation, DescriptorChain, DeviceError, GuestRam, Interrupt, RequestHandler, RunState,
    Served, ServedQueue, Turn,
};

/// The requests that one call serves on one queue, and the bytes of memory that they name. The
/// host's work grows with the pages, as each may cost a system call.
const BUDGET: Budget = Budget::new(64, 256 << 20);
/// The most page numbers in one request. Linux sends 256, others up to a few thousand.
pub(super) const MAX_PAGES: usize = 16 << 10;
/// The most memory that one report may name, in bytes. Linux reports up to 128 MiB.
const MAX_REPORT: u64 = 1 << 30;
/// The driver's command that ends a round of hinting.
const HINT_STOP: u32 = 0;

/// The purpose of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Stats,
    Hint,
    Report,
}

impl Role {
    /// All roles, in the order of the specification's queue numbers.
    pub(super) const ALL: [Self; 5] = [
        Self::Inflate,
        Self::Deflate,
        Self::Stats,
        Self::Hint,
        Self::Report,
    ];

    fn is_agreed(self, features: u64) -> bool {
        match self {
            Self::Inflate | Self::Deflate => true,
            Self::Stats => features & F_STATS != 0,
            Self::Hint => features & F_HINT != 0,
            Self::Report => features & F_REPORTING != 0,
        }
    }
}

/// A round of hinting.
pub(super) struct Hints {
    round: u32,
    phase: HintPhase,
    sink: Box<dyn ReleaseRanges>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum HintPhase {
    Requested,
    Collecting,
    Complete,
}

impl Hints {
    pub(super) fn new(round: u32, sink: Box<dyn ReleaseRanges>) -> Self {
        Self {
            round,
            phase: HintPhase::Requested,
            sink,
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.phase == HintPhase::Complete
    }

    /// Handles a command of the driver, or free pages.
    fn take(
        &mut self,
        queue: &ServedQueue,
        chain: &DescriptorChain<'_>,
    ) -> Result<(), DeviceError> {
        if chain.readable_len() > 0 {
            let command = chain
                .reader()
                .read_array()
                .map_err(|_| queue.driver_error("a hinting command is shorter than 4 bytes"))?;
            self.command(u32::from_le_bytes(command));
        }
        if self.phase == HintPhase::Collecting && chain.writable_len() > 0 {
            let released = self.sink.release(&buffer_runs(chain));
            released.map_err(DEVICE.host_error("take free pages"))?;
        }
        Ok(())
    }

    /// Handles the driver's command that names the round of its next pages.
    fn command(&mut self, command: u32) {
        self.phase = match self.phase {
            HintPhase::Requested if command == self.round => HintPhase::Collecting,
            HintPhase::Collecting if command == HINT_STOP => HintPhase::Complete,
            phase => phase,
        };
    }
}

/// The resources of the activation.
pub(super) struct Queues {
    pub(super) ram: GuestRam,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) run_state: RunState,
    pub(super) events: Registrar,
    rings: Vec<(Role, ServedQueue)>,
}

impl Queues {
    pub(super) fn new(activation: Activation) -> Result<Self, DeviceError> {
        let features = activation.features;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let agreed = |role: &Role| role.is_agreed(features);
        let roles: Vec<Role> = Role::ALL.into_iter().filter(agreed).collect();
        if activation.queues.len() != roles.len() {
            return Err(DEVICE.driver_error(format!(
                "it set up {} queues where its features need {}",
                activation.queues.len(),
                roles.len()
            )));
        }
        // The queues are those of the agreed roles, in order, whether the driver numbers them as
        // the specification does or without gaps, as Linux does.
        let queues = activation.queues.into_iter();
        let ring = |queue| ServedQueue::new(DEVICE, queue, event_idx);
        Ok(Self {
            ram: activation.ram,
            interrupt: activation.interrupt,
            run_state: activation.run_state,
            events: activation.events,
            rings: roles.into_iter().zip(queues.map(ring)).collect(),
        })
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.rings.iter().any(|(of, _)| *of == role)
    }

    pub(super) fn role(&self, index: u16) -> Option<Role> {
        let found = self.rings.iter().find(|(_, ring)| ring.index() == index);
        found.map(|(role, _)| *role)
    }

    pub(super) fn list(&self) -> Vec<(u16, &Queue)> {
        self.rings.iter().map(|(_, ring)| ring.indexed()).collect()
    }

    /// Passes the requests of a queue to `handler`. A queue that was not agreed on has none.
    fn serve<'m>(
        ram: &'m GuestRam,
        interrupt: &dyn Interrupt,
        rings: &mut [(Role, ServedQueue)],
        role: Role,
        handler: &mut impl RequestHandler<'m>,
    ) -> Result<(), DeviceError> {
        let Some((_, queue)) = rings.iter_mut().find(|(of, _)| *of == role) else {
            return Ok(());
        };
        let mut budget = BUDGET;
        queue.serve(ram, interrupt, &mut Turn::new(&mut budget), handler)?;
        Ok(())
    }

    /// As [`Queues::serve`], for requests that are finished at once. `work` returns the bytes of
    /// memory that a request names.
    fn serve_at_once(
        &mut self,
        role: Role,
        mut work: impl FnMut(&ServedQueue, &DescriptorChain<'_>) -> Result<u64, DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut handler = |queue: &mut ServedQueue, chain: &mut DescriptorChain<'_>| {
            let bytes = work(queue, chain)?;
            Ok(Served::Used { written: 0, bytes })
        };
        let Self {
            ram,
            interrupt,
            rings,
            ..
        } = self;
        Self::serve(ram, &**interrupt, rings, role, &mut handler)
    }

    /// Serves the pages that go into the balloon.
    pub(super) fn inflate(&mut self, release: &mut dyn ReleaseRanges) -> Result<(), DeviceError> {
        let ram = self.ram.clone();
        self.serve_at_once(Role::Inflate, |queue, chain| {
            let runs = page_runs(&ram, queue, chain)?;
            release
                .release(&runs)
                .map_err(DEVICE.host_error("release pages of the balloon"))?;
            Ok(listed_bytes(chain))
        })
    }

    /// Serves the pages that come out of the balloon: they are there when touched.
    pub(super) fn deflate(&mut self) -> Result<(), DeviceError> {
        let ram = self.ram.clone();
        self.serve_at_once(Role::Deflate, |queue, chain| {
            page_runs(&ram, queue, chain)?;
            Ok(listed_bytes(chain))
        })
    }

    /// Serves the free pages that the driver reports: they are the buffers.
    pub(super) fn take_reports(
        &mut self,
        release: &mut dyn ReleaseRanges,
    ) -> Result<(), DeviceError> {
        self.serve_at_once(Role::Report, |queue, chain| {
            let bytes = reported_bytes(queue, chain)?;
            release
                .release(&buffer_runs(chain))
                .map_err(DEVICE.host_error("release free pages"))?;
            Ok(bytes)
        })
    }

    /// Serves the free pages that the driver was asked for, and its commands about them.
    pub(super) fn take_hints(&mut self, hints: Option<&mut Hints>) -> Result<(), DeviceError> {
        let mut hints = hints;
        self.serve_at_once(Role::Hint, |queue, chain| {
            let bytes = reported_bytes(queue, chain)?;
            match hints.as_deref_mut() {
                Some(hints) => hints.take(queue, chain).map(|()| bytes),
                None => Ok(bytes),
            }
        })
    }

    /// Takes the statistics that came. Their buffer is `held` until the device wants more.
    pub(super) fn take_stats(
        &mut self,
        held: &mut Option<u16>,
    ) -> Result<Option<BalloonStats>, DeviceError> {
        let Self {
            ram,
            interrupt,
            rings,
            ..
        } = self;
        let ram = &*ram;
        let mut stats = None;
        let mut handler = |queue: &mut ServedQueue, chain: &mut DescriptorChain<'_>| {
            // One buffer is held; a driver that offers more gets the older ones back.
            if let Some(older) = held.replace(chain.head()) {
                queue.push_used(ram, older, 0)?;
            }
            let mut bytes = vec![0; chain.readable_len().min(PAIR * MAX_PAIRS)];
            if chain.reader().read_exact(&mut bytes).is_ok() {
                stats = Some(BalloonStats::parse(&bytes));
            }
            Ok(Served::Kept { bytes: 0 })
        };
        Self::serve(ram, &**interrupt, rings, Role::Stats, &mut handler)?;
        Ok(stats)
    }

    /// Gives the `held` buffer back, which asks for statistics.
    pub(super) fn request_stats(&mut self, held: &mut Option<u16>) -> Result<(), DeviceError> {
        let Some((_, ring)) = self.rings.iter_mut().find(|(of, _)| *of == Role::Stats) else {
            return Ok(());
        };
        if let Some(head) = held.take() {
            ring.push_used(&self.ram, head, 0)?;
            ring.signal(&self.ram, &*self.interrupt)?;
        }
        Ok(())
    }
}

/// The memory that a request's list of pages names in bytes, with pages that are listed twice.
fn listed_bytes(chain: &DescriptorChain<'_>) -> u64 {
    chain.readable_len() as u64 / 4 * PAGE
}

/// The memory that a report names, in bytes.
fn reported_bytes(queue: &ServedQueue, chain: &DescriptorChain<'_>) -> Result<u64, DeviceError> {
    let bytes = chain.writable_len() as u64;
    match bytes <= MAX_REPORT {
        true => Ok(bytes),
        false => Err(queue.driver_error(format_args!(
            "a report names {bytes} bytes of free memory, which is too much"
        ))),
    }
}

/// The pages that a request lists by number, as runs that are sorted, disjoint and inside RAM.
fn page_runs(
    ram: &GuestRam,
    queue: &ServedQueue,
    chain: &DescriptorChain<'_>,
) -> Result<Vec<GuestRange>, DeviceError> {
    let len = chain.readable_len();
    if len == 0 || len / 4 > MAX_PAGES || !len.is_multiple_of(4) {
        return Err(queue.driver_error(format_args!("{len} bytes are not a list of pages")));
    }
    let mut bytes = vec![0; len];
    let read = chain.reader().read_exact(&mut bytes);
    read.map_err(|error| queue.driver_error(error))?;
    let mut pages: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|page| u32::from_le_bytes([page[0], page[1], page[2], page[3]]))
        .collect();
    pages.sort_unstable();
    let mut runs = Vec::new();
    for page in pages {
        push_run(&mut runs, u64::from(page) * PAGE, PAGE);
    }
    let outside = runs.iter().find(|run| {
        let len = run.len as usize;
        !ram.check_range(run.start, len, Permissions::ReadWrite)
    });
    match outside {
        Some(run) => Err(queue.driver_error(format_args!("pages {run:x?} are not in RAM"))),
        None => Ok(runs),
    }
}

/// The whole pages of the writable buffers, as runs that are sorted and disjoint. They are inside
/// RAM, because the chain was validated.
fn buffer_runs(chain: &DescriptorChain<'_>) -> Vec<GuestRange> {
    let mut stretches: Vec<(u64, u64)> = chain
        .writer()
        .segments()
        .map(|Segment { address, slice }| (address.0, slice.len() as u64))
        .collect();
    stretches.sort_unstable();
    let mut runs = Vec::new();
    for (start, len) in stretches {
        push_run(&mut runs, start, len);
    }
    runs.retain_mut(|run| {
        let end = (run.start.0 + run.len) / PAGE * PAGE;
        run.start = GuestAddress(run.start.0.next_multiple_of(PAGE));
        run.len = end.saturating_sub(run.start.0);
        run.len > 0
    });
    runs
}

/// Adds a range that starts no earlier than the last run does. The two are joined if they touch.
fn push_run(runs: &mut Vec<GuestRange>, start: u64, len: u64) {
    if let Some(last) = runs.last_mut()
        && start <= last.start.0 + last.len
    {
        last.len = last.len.max(start + len - last.start.0);
        return;
    }
    runs.push(GuestRange {
        start: GuestAddress(start),
        len,
    });
}
