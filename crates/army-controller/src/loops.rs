//! Whether the controller's loops and the tasks of its hosts are alive: each notes when it begins a
//! round.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Controller;

/// The loop that starts and ends the tasks of hosts.
pub(crate) const RECONCILE: &str = "reconcile";
/// The loop that renews the controller's lease of the database.
pub(crate) const TERM: &str = "term";
/// The loop that writes down what was measured.
pub(crate) const FIGURES: &str = "figures";
/// The loop that removes old records.
pub(crate) const PURGE: &str = "purge";
/// The loop that renews the certificates of nodes.
pub(crate) const RENEWAL: &str = "renewal";
/// The loop that delivers events to webhooks.
pub(crate) const WEBHOOKS: &str = "webhooks";
/// A loop is stuck when its last round began so long ago.
const STUCK: Duration = Duration::from_secs(120);
/// The same for the task of a host, which waits for a node in this process for as long as it takes.
const HOST_STUCK: Duration = Duration::from_secs(600);
/// The same for the renewal, whose rounds are an hour apart.
const RENEWAL_STUCK: Duration = Duration::from_secs(2 * 3600);

/// When each loop began its last round.
#[derive(Default)]
pub(crate) struct Loops {
    loops: Mutex<BTreeMap<&'static str, Instant>>,
    /// The tasks of hosts, by host.
    hosts: Mutex<BTreeMap<String, Instant>>,
}

impl Loops {
    /// Notes that a loop begins a round.
    pub(crate) fn begin_round(&self, name: &'static str) {
        let mut rounds = self.loops.lock().unwrap_or_else(PoisonError::into_inner);
        rounds.insert(name, Instant::now());
    }

    /// Notes that the task of a host begins a round.
    pub(crate) fn begin_host_round(&self, host: &str) {
        let mut rounds = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        match rounds.get_mut(host) {
            Some(at) => *at = Instant::now(),
            None => {
                rounds.insert(host.to_owned(), Instant::now());
            }
        }
    }

    /// Notes that a host has no task any more.
    pub(crate) fn end_host(&self, host: &str) {
        let mut rounds = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        rounds.remove(host);
    }
}

impl Controller {
    /// The time since each loop began its last round. A loop that has not begun is missing.
    pub fn loop_ages(&self) -> Vec<(&'static str, Duration)> {
        let rounds = self.loops.loops.lock();
        let rounds = rounds.unwrap_or_else(PoisonError::into_inner);
        let ages = rounds.iter().map(|(name, at)| (*name, at.elapsed()));
        ages.collect()
    }

    /// The time since the task of each own host began its last round.
    pub fn host_task_ages(&self) -> Vec<(String, Duration)> {
        let rounds = self.loops.hosts.lock();
        let rounds = rounds.unwrap_or_else(PoisonError::into_inner);
        let ages = rounds.iter().map(|(host, at)| (host.clone(), at.elapsed()));
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
        if let Some((name, age)) = ages.iter().find(is_stuck) {
            let seconds = age.as_secs();
            return Some(format!("the loop `{name}` has not turned for {seconds} s"));
        }
        let mut hosts = self.host_task_ages().into_iter();
        let (host, age) = hosts.find(|(_, age)| *age > HOST_STUCK)?;
        let seconds = age.as_secs();
        Some(format!(
            "the task of the host {host} has not turned for {seconds} s"
        ))
    }
}
