//! Comparing what hosts report with what was requested, and recording the difference. The
//! task of each host (`host_task`) asks for the reports, and acts on what is found.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use army_api::vms::VmState;
use army_node_api::requests::{HostReport, VmReport};
use army_node_api::time::now_ms;

use crate::mirror::Known;
use crate::store::vm_states::StateChange;
use crate::{Controller, LastReport, Result, hosts, loops};

/// A VM that a controller was creating whose term has ended, and that its host does not know, counts
/// as lost after so long: until then the request may still be on its way.
const CREATION: Duration = Duration::from_secs(10);

/// How long hosts are waited for before operations of controllers that have ended are resumed.
const FIRST_ROUND: Duration = Duration::from_secs(10);

/// How many VMs of a host are looked at for what clones of their templates cost.
const COST_SAMPLES: usize = 16;

/// The controllers that create VMs.
#[derive(Default)]
pub(crate) struct Creators {
    /// Those whose terms have not ended.
    live: HashSet<String>,
    /// When it was first noticed that others have ended.
    ended: HashMap<String, Instant>,
}

/// What was known when a host was asked for its report.
#[derive(Default)]
pub(crate) struct Asked {
    /// The last change of VMs that was known. VMs that were changed since may be otherwise in the
    /// report.
    last_change: i64,
    /// The VMs that this process was creating. One may be missing in the report although its
    /// creation has finished when the report arrives.
    in_creation: HashSet<String>,
}

/// What is to be done on a host after its report. All are ids of VMs.
#[derive(Default)]
pub(crate) struct Findings {
    /// VMs that are to be ended, and then recorded as such.
    pub(crate) unwanted: Vec<String>,
    /// VMs that run and have ended by the database.
    pub(crate) ended_but_running: Vec<String>,
    /// VMs that have ended and are recorded as such: the node may forget them.
    pub(crate) ended: Vec<String>,
    /// Whether VMs were changed and the host has not applied that.
    pub(crate) has_unapplied: bool,
    /// VMs of the host that it does not know to be its own, after a move that has failed, with the epochs
    /// in which they run.
    pub(crate) undecided: Vec<(String, u64)>,
}

/// How the VMs of a report differ from those that are known.
#[derive(Default)]
struct Comparison {
    unwanted: Vec<String>,
    /// VMs in another state, as indices of the report, with the change that they are known by.
    changed: Vec<(usize, i64)>,
    /// VMs that the host does not have, with the change that they are known by.
    missing: Vec<(String, i64)>,
    /// VMs that are not known, as indices of the report.
    unknown: Vec<usize>,
    has_unapplied: bool,
    undecided: Vec<(String, u64)>,
}

impl Controller {
    /// Continues where an earlier process stopped: hosts report, and the operations of controllers
    /// that have ended are resumed, while new requests are served already.
    ///
    /// # Errors
    /// Where the database cannot be used.
    pub async fn recover(self: &Arc<Self>) -> Result<()> {
        self.take_hosts().await?;
        // What is not done by then is done by the tasks of the hosts.
        if let Ok(polled) = tokio::time::timeout(FIRST_ROUND, self.poll_nodes()).await {
            polled?;
        }
        self.loops.begin_round(loops::RECONCILE);
        self.take_over_operations().await
    }

    /// What is known before a host is asked for its report.
    pub(crate) async fn prepare_report(&self, host: &str) -> Result<Asked> {
        self.mirror.add_host(&self.store, host).await?;
        let asked = Asked {
            last_change: self.mirror.last(),
            in_creation: self.admission.vms_in_creation(),
        };
        self.admission.begin_measurement(host);
        Ok(asked)
    }

    /// Records a host as unreachable when it has not reported for some time. Its VMs may be running.
    pub(crate) async fn mark_unreachable(&self, host: &str) -> Result<()> {
        let is_recent = self.reports().get(host).map(LastReport::is_recent);
        if is_recent.unwrap_or_else(|| hosts::is_recent(self.started)) {
            return Ok(());
        }
        let vms = self.mirror.with_host(host, |vms| {
            let vms = vms.iter();
            let alive = vms.filter(|(_, vm)| vm.state.is_reported());
            alive.map(|(id, _)| id.clone()).collect::<Vec<String>>()
        });
        let vms = vms.unwrap_or_default();
        if vms.is_empty() && self.is_known_unreachable(host).await? {
            return Ok(());
        }
        let detail = format!("does not answer; {} VMs are on it", vms.len());
        self.store.set_reachable(host, false, &detail).await?;
        let reason = "its host does not answer; the VM may still be running";
        let unreachable = self.store.set_vm_states(&vms, VmState::Unreachable, reason);
        unreachable.await
    }

    async fn is_known_unreachable(&self, host: &str) -> Result<bool> {
        let rows = self.host_rows().await?;
        let row = rows.iter().find(|row| row.name == host);
        Ok(row.is_some_and(|row| !row.is_reachable))
    }

    /// Records what a host reports. Returns what is to be done on it.
    pub(crate) async fn apply_report(
        &self,
        host: &str,
        mut report: HostReport,
        asked: Asked,
    ) -> Result<Findings> {
        let vms = std::mem::take(&mut report.vms);
        let alive = vms.iter().filter(|vm| vm.state.is_alive()).count();
        // This precedes the database: a full disk of the controller does not make a host
        // unreachable.
        let last = LastReport {
            report,
            vms: alive as u32,
            at: Instant::now(),
            seen_ms: now_ms(),
        };
        let former = self.reports().insert(host.to_owned(), last);
        self.admission.host_measured(host);
        if former.is_none_or(|former| !former.is_recent()) {
            self.store.set_reachable(host, true, "answers").await?;
        }
        // Changes since the host was asked are read, so that few VMs are unknown.
        self.mirror.refresh(&self.store).await?;
        // VMs that were added since may be in the report; whoever creates them records them.
        let mut in_creation = asked.in_creation;
        in_creation.extend(self.admission.vms_in_creation());
        let is_in_creation = |id: &str, vm: &Known| {
            in_creation.contains(id)
                || (vm.state == VmState::Creating && self.may_be_creating(vm.creator.as_deref()))
        };
        let compared = self.mirror.with_host(host, |known| {
            let compared = compare(known, &vms, asked.last_change, is_in_creation);
            (compared, costs(known))
        });
        let Some((compared, costs)) = compared else {
            // The host is not this controller's any more.
            return Ok(Findings::default());
        };
        for (template, cost_bytes) in costs {
            self.admission.template_measured(&template, cost_bytes);
        }
        let mut findings = Findings {
            unwanted: compared.unwanted,
            has_unapplied: compared.has_unapplied,
            undecided: compared.undecided,
            ..Findings::default()
        };
        self.record_lost(compared.missing).await?;
        let changes = compared.changed.iter().map(|(index, changed)| StateChange {
            id: &vms[*index].id,
            state: vms[*index].state,
            reason: vms[*index].reason.as_deref(),
            unless_changed_since: Some(*changed),
        });
        let changes: Vec<_> = changes.collect();
        let changed = self.store.change_vm_states(&changes).await?;
        let ended: HashSet<&str> = changes
            .iter()
            .filter(|change| !change.state.is_alive())
            .map(|change| change.id)
            .collect();
        findings.ended = changed;
        findings.ended.retain(|id| ended.contains(id.as_str()));
        let unknown = compared.unknown.iter().map(|index| &vms[*index]);
        let unknown = unknown.filter(|vm| !in_creation.contains(&vm.id));
        let (alive, over): (Vec<_>, Vec<_>) = unknown.partition(|vm| vm.state.is_alive());
        let ids = |vms: Vec<&VmReport>| -> Vec<String> {
            vms.into_iter().map(|vm| vm.id.clone()).collect()
        };
        // A node of a former release says no epochs.
        let elsewhere = |vms: &[&'_ VmReport]| -> Vec<(String, u64)> {
            let vms = vms.iter().filter(|vm| vm.epoch > 0);
            vms.map(|vm| (vm.id.clone(), vm.epoch)).collect()
        };
        let (left, left_over) = (elsewhere(&alive), elsewhere(&over));
        findings.ended_but_running = self.store.ended_vms(&ids(alive)).await?;
        findings
            .ended
            .extend(self.store.ended_vms(&ids(over)).await?);
        // What is left of VMs that were moved to other hosts.
        let left = self.store.vms_elsewhere(host, &left).await?;
        findings.ended_but_running.extend(left);
        let left_over = self.store.vms_elsewhere(host, &left_over).await?;
        findings.ended.extend(left_over);
        Ok(findings)
    }

    /// Reads which controllers there are.
    pub(crate) async fn read_creators(&self) -> Result<()> {
        let live = self.store.live_controllers().await?.into_iter();
        let mut creators = self.creators.lock().unwrap_or_else(PoisonError::into_inner);
        creators.live = live.map(|term| term.id).collect();
        let Creators { live, ended } = &mut *creators;
        ended.retain(|id, _| !live.contains(id));
        Ok(())
    }

    /// Whether the request of a controller to create a VM, which this process is not creating, may
    /// still arrive at its host.
    fn may_be_creating(&self, creator: Option<&str>) -> bool {
        // The only node is in this process, and no older than it.
        if self.cluster.is_none() {
            return false;
        }
        let creator = creator.unwrap_or_default();
        if creator == self.store.term().id {
            return false;
        }
        let mut creators = self.creators.lock().unwrap_or_else(PoisonError::into_inner);
        if creators.live.contains(creator) {
            return true;
        }
        let ended = creators.ended.entry(creator.to_owned());
        ended.or_insert_with(Instant::now).elapsed() < CREATION
    }

    /// Records VMs as failed that their host does not know, unless they were changed meanwhile.
    async fn record_lost(&self, missing: Vec<(String, i64)>) -> Result<()> {
        let lost = missing.iter().map(|(id, changed)| StateChange {
            id,
            state: VmState::Failed,
            reason: Some("its host does not know the VM"),
            unless_changed_since: Some(*changed),
        });
        let lost: Vec<_> = lost.collect();
        self.store.change_vm_states(&lost).await.map(drop)
    }
}

/// Compares a report with the VMs that are known of its host. VMs that were changed after
/// `last_change` are left alone, and so are those that are being created.
/// What some of a host's VMs cost on average by what they were forked from, in bytes.
fn costs(known: &HashMap<String, Known>) -> HashMap<String, u64> {
    let measured = known.values().filter_map(|vm| Some((vm, vm.memory?)));
    let mut sums: HashMap<&str, (u64, u64)> = HashMap::new();
    for (vm, memory) in measured.take(COST_SAMPLES) {
        let (sum, count) = sums.entry(&vm.template).or_default();
        *sum = sum.saturating_add(memory.private_bytes);
        *count += 1;
    }
    let sums = sums.into_iter();
    let averages = sums.map(|(template, (sum, count))| (template.to_owned(), sum / count));
    averages.collect()
}

fn compare(
    known: &mut HashMap<String, Known>,
    reported: &[VmReport],
    last_change: i64,
    is_in_creation: impl Fn(&str, &Known) -> bool,
) -> Comparison {
    let mut compared = Comparison::default();
    let seen = known.values().map(|vm| vm.seen).max().unwrap_or(0) + 1;
    let mut found = 0;
    for (index, report) in reported.iter().enumerate() {
        let Some(vm) = known.get_mut(&report.id) else {
            compared.unknown.push(index);
            continue;
        };
        vm.seen = seen;
        found += 1;
        if report.memory.is_some() {
            vm.memory = report.memory;
            vm.addresses.clone_from(&report.addresses);
        }
        if vm.state == VmState::Migrating {
            // Whoever moves the VM decides where it is, but not whether it is wanted.
            if !vm.wanted && report.state.is_alive() {
                compared.unwanted.push(report.id.clone());
            }
            continue;
        }
        if vm.changed > last_change
            || report.state == VmState::Creating
            || is_in_creation(&report.id, vm)
        {
            continue;
        }
        compared.has_unapplied |= vm.pending && report.state.is_alive();
        if !vm.wanted && report.state.is_alive() {
            compared.unwanted.push(report.id.clone());
        }
        if report.state == VmState::Migrating {
            compared.undecided.push((report.id.clone(), vm.epoch));
            continue;
        }
        if vm.state != report.state {
            compared.changed.push((index, vm.changed));
        }
    }
    if found == known.len() {
        return compared;
    }
    for (id, vm) in known.iter().filter(|(_, vm)| vm.seen != seen) {
        if vm.changed > last_change || is_in_creation(id, vm) {
            continue;
        }
        if vm.state == VmState::Migrating && vm.wanted {
            continue;
        }
        match vm.wanted {
            true => compared.missing.push((id.clone(), vm.changed)),
            // The host has ended it, or never had it: asking again makes sure of it.
            false => compared.unwanted.push(id.clone()),
        }
    }
    compared
}
