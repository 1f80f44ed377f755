//! Whether the controller's loops are alive: each notes when it begins a round.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Controller;

/// The loop that polls the nodes.
pub(crate) const RECONCILE: &str = "reconcile";
/// The loop that renews the certificates of nodes.
pub(crate) const RENEWAL: &str = "renewal";
/// A loop is stuck when its last round began so long ago. A round ends unwanted VMs, each of which
/// may take some minutes.
const STUCK: Duration = Duration::from_secs(600);
/// The same for the renewal, whose rounds are an hour apart.
const RENEWAL_STUCK: Duration = Duration::from_secs(2 * 3600);

/// When each loop began its last round.
#[derive(Default)]
pub(crate) struct Loops(Mutex<BTreeMap<&'static str, Instant>>);

impl Loops {
    /// Notes that a loop begins a round.
    pub(crate) fn begin_round(&self, name: &'static str) {
        let mut rounds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rounds.insert(name, Instant::now());
    }
}

impl Controller {
    /// The time since each loop began its last round. A loop that has not begun is missing.
    pub fn loop_ages(&self) -> Vec<(&'static str, Duration)> {
        let rounds = self.loops.0.lock();
        let rounds = rounds.unwrap_or_else(PoisonError::into_inner);
        let ages = rounds.iter().map(|(name, at)| (*name, at.elapsed()));
        ages.collect()
    }

    /// Why the controller is not ready, as a sentence; `None` where it is: its loops turn, and every
    /// host was asked once.
    pub fn unready(&self) -> Option<String> {
        let ages = self.loop_ages();
        if !ages.iter().any(|(name, _)| *name == RECONCILE) {
            return Some("the hosts were not asked for their VMs yet".to_owned());
        }
        let is_stuck = |(name, age): &&(&str, Duration)| match *name {
            RENEWAL => *age > RENEWAL_STUCK,
            _ => *age > STUCK,
        };
        let (name, age) = ages.iter().find(is_stuck)?;
        let seconds = age.as_secs();
        Some(format!("the loop `{name}` has not turned for {seconds} s"))
    }
}
