//! The times at which the device must act although no event came. One timer serves any number of
//! deadlines. It is set only for an earlier deadline, so that short connections cost no system
//! call.

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use crate::timer::Timer;

/// The deadlines, by token.
pub(super) struct Deadlines {
    timer: Timer,
    waiting: BTreeSet<(Instant, u32)>,
    armed: Option<Instant>,
}

impl Deadlines {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            timer: Timer::new()?,
            waiting: BTreeSet::new(),
            armed: None,
        })
    }

    pub(super) fn timer(&self) -> &Timer {
        &self.timer
    }

    pub(super) fn add(&mut self, at: Instant, token: u32) {
        self.waiting.insert((at, token));
    }

    pub(super) fn remove(&mut self, at: Instant, token: u32) {
        self.waiting.remove(&(at, token));
    }

    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// Moves every deadline into the future by `span`.
    pub(super) fn delay(&mut self, span: Duration) {
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting = waiting
            .into_iter()
            .map(|(at, token)| (at + span, token))
            .collect();
    }

    /// Disarms the timer until [`Deadlines::arm`].
    pub(super) fn disarm(&mut self) -> io::Result<()> {
        self.armed = None;
        self.timer.disarm()
    }

    /// Removes and returns the tokens that are due.
    pub(super) fn take_due(&mut self, now: Instant) -> io::Result<Vec<u32>> {
        if self.timer.take()? {
            self.armed = None;
        }
        let mut due = Vec::new();
        while let Some(&(at, token)) = self.waiting.first() {
            if at > now {
                break;
            }
            self.waiting.pop_first();
            due.push(token);
        }
        Ok(due)
    }

    /// Makes the timer fire at the earliest deadline, or earlier.
    pub(super) fn arm(&mut self, now: Instant) -> io::Result<()> {
        let Some(&(first, _)) = self.waiting.first() else {
            return Ok(());
        };
        if self.armed.is_none_or(|armed| first < armed) {
            self.timer.arm_once(first.saturating_duration_since(now))?;
            self.armed = Some(first);
        }
        Ok(())
    }
}
