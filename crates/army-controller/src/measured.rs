//! Writing down what was measured of own hosts and their VMs: at a slow rhythm, and where it has
//! changed much. In between, figures are in the memory of the hosts' owner only. Other controllers
//! choose hosts by what was written.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use army_api::hosts::Capacity;
use army_api::vms::VmMemory;

use crate::store::hosts::{HostFacts, Measured};
use crate::{Controller, LastReport, Result, loops, random};

/// How often it is looked for figures that have changed.
const ROUND: Duration = Duration::from_secs(2);
/// How often at least the figures of a host are written although they have not changed much.
const SLOW: Duration = Duration::from_secs(30);
/// The most hosts whose figures are written in one transaction.
const HOSTS: usize = 100;
/// The most VMs whose memory is written in one transaction.
const VMS: usize = 250;
/// A change of a VM's memory that is less than this is not much, in bytes.
const LITTLE: u64 = 4 << 20;

/// What was last written of each host.
pub(crate) type Written = HashMap<String, (Instant, Capacity, HostFacts)>;

impl Controller {
    /// Writes figures down, without an end.
    pub(crate) async fn record_figures(self: Arc<Self>) {
        loop {
            self.loops.begin_round(loops::FIGURES);
            if let Err(error) = self.record_figures_once().await {
                tracing::warn!(%error, "cannot write down what was measured");
            }
            tokio::time::sleep(ROUND).await;
        }
    }

    pub(crate) async fn record_figures_once(&self) -> Result<()> {
        let due = self.due_figures();
        // Requests do not wait for the figures of a large fleet.
        for hosts in due.chunks(HOSTS) {
            self.store.record_measured(hosts).await?;
        }
        self.note_written(due);
        self.record_memory().await
    }

    fn note_written(&self, figures: Vec<Measured>) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        for it in figures {
            // Hosts that were written together are not all due together the next time.
            let earlier = SLOW.mul_f64(random::fraction() / 2.0);
            let now = Instant::now();
            let at = now.checked_sub(earlier).unwrap_or(now);
            written.insert(it.host, (at, it.capacity, it.facts));
        }
    }

    fn due_figures(&self) -> Vec<Measured> {
        let reports = self.reports();
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.retain(|host, _| reports.contains_key(host));
        let due = reports.iter().filter_map(|(host, last)| {
            let facts = last.facts();
            let capacity = last.report.capacity;
            let is_due = written.get(host).is_none_or(|(at, of, known)| {
                at.elapsed() >= SLOW || *known != facts || has_moved(of, &capacity)
            });
            is_due.then(|| Measured {
                host: host.clone(),
                seen_ms: last.seen_ms,
                capacity,
                facts,
            })
        });
        due.collect()
    }

    /// Writes down the memory of VMs whose memory has changed much.
    async fn record_memory(&self) -> Result<()> {
        let hosts: Vec<String> = self.reports().keys().cloned().collect();
        let mut batch = Vec::new();
        for host in hosts {
            self.mirror.with_host(&host, |vms| {
                for (id, vm) in vms {
                    if let Some(memory) = vm.memory
                        && vm.written.is_none_or(|of| has_grown(&of, &memory))
                    {
                        vm.written = Some(memory);
                        batch.push((id.clone(), memory, vm.addresses.clone()));
                    }
                }
            });
            if batch.len() >= VMS {
                self.store
                    .record_memory(&std::mem::take(&mut batch))
                    .await?;
            }
        }
        self.store.record_memory(&batch).await
    }
}

impl LastReport {
    fn facts(&self) -> HostFacts {
        let report = &self.report;
        let ready = report.ready.iter();
        HostFacts {
            vms: self.vms,
            ready: ready.map(|(name, count)| (name.clone(), *count)).collect(),
            cpu: report.cpu.clone(),
            missing_jail_layers: report.missing_jail_layers.clone(),
            notices: report.notices.clone(),
        }
    }
}

/// Whether the figures that hosts are chosen by have changed by more than a twentieth.
fn has_moved(written: &Capacity, now: &Capacity) -> bool {
    let differs = |a: u64, b: u64, of: u64| a.abs_diff(b) > of / 20;
    written.cpus != now.cpus
        || written.memory_bytes != now.memory_bytes
        || differs(
            written.available_bytes,
            now.available_bytes,
            now.memory_bytes,
        )
        || differs(
            written.load_milli.into(),
            now.load_milli.into(),
            u64::from(now.cpus) * 2000,
        )
}

/// Whether a VM's memory has changed by more than a quarter.
fn has_grown(written: &VmMemory, now: &VmMemory) -> bool {
    let differs = |a: u64, b: u64| a.abs_diff(b) > (a / 4).max(LITTLE);
    differs(written.private_bytes, now.private_bytes)
        || differs(written.shared_bytes, now.shared_bytes)
        || differs(written.swapped_bytes, now.swapped_bytes)
        || written.guest_bytes != now.guest_bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_change_of_a_figure_is_not_written() {
        let capacity = |available_bytes, load_milli| Capacity {
            cpus: 4,
            memory_bytes: 100 << 30,
            available_bytes,
            load_milli,
            ..Capacity::default()
        };
        assert!(!has_moved(&capacity(50 << 30, 0), &capacity(46 << 30, 300)));
        assert!(has_moved(&capacity(50 << 30, 0), &capacity(44 << 30, 0)));
        assert!(has_moved(&capacity(50 << 30, 0), &capacity(50 << 30, 900)));
        let memory = |private_bytes| VmMemory {
            private_bytes,
            ..VmMemory::default()
        };
        assert!(!has_grown(&memory(100 << 20), &memory(120 << 20)));
        assert!(!has_grown(&memory(1 << 20), &memory(4 << 20)));
        assert!(has_grown(&memory(100 << 20), &memory(130 << 20)));
    }
}
