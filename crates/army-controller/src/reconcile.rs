//! Polling the nodes, and acting on the difference between what was requested and what they report.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use army_api::vms::VmState;
use army_node_api::requests::{DestroyVmRequest, ForgetVmsRequest, HostReport, ReportRequest};
use futures_util::future::join_all;

use crate::store::vms::PlacedVm;
use crate::vms::DESTROYED;
use crate::{Controller, LastReport, Node, Result, deadlines, loops};

/// How often hosts are polled.
const ROUND: Duration = Duration::from_secs(1);
/// A host is unreachable when it has not reported for so long.
const SILENCE: Duration = Duration::from_secs(15);
/// A VM that an earlier process was creating, and that its host does not know, counts as lost when
/// this process has run for so long: until then the request may still be on its way.
const CREATION: Duration = Duration::from_secs(60);

/// Requests that an earlier process left unanswered, as tenant and idempotency key.
pub struct InterruptedRequests(Vec<(String, String)>);

impl Controller {
    /// Continues where an earlier process stopped: standbys of templates are kept again, and
    /// requests that were not answered are answered with what became of their VMs.
    ///
    /// # Errors
    /// Where the database cannot be used.
    pub async fn recover(&self) -> Result<()> {
        let interrupted = self.interrupted_requests().await?;
        self.recover_requests(interrupted).await
    }

    /// The requests that an earlier process left unanswered. They are read before the first request
    /// of this process.
    ///
    /// # Errors
    /// Where the database cannot be used.
    pub async fn interrupted_requests(&self) -> Result<InterruptedRequests> {
        Ok(InterruptedRequests(self.store.unanswered_requests().await?))
    }

    /// The same as [`recover`](Self::recover), while new requests are served already.
    ///
    /// # Errors
    /// Where the database cannot be used.
    pub async fn recover_requests(&self, interrupted: InterruptedRequests) -> Result<()> {
        self.poll_nodes().await;
        self.loops.begin_round(loops::RECONCILE);
        for template in self.store.templates().await? {
            if let Err(error) = self.apply_standbys(&template).await {
                tracing::warn!(template = template.name, %error, "cannot keep standbys ready");
            }
        }
        self.answer_interrupted_requests(interrupted.0).await
    }

    /// Polls all nodes, without an end.
    pub async fn reconcile(self: Arc<Self>) {
        loop {
            self.loops.begin_round(loops::RECONCILE);
            self.poll_nodes().await;
            tokio::time::sleep(ROUND).await;
        }
    }

    /// Polls all nodes at the same time, so that one that does not answer does not delay others.
    async fn poll_nodes(&self) {
        let nodes = self.nodes();
        join_all(nodes.iter().map(|node| async {
            let recorded = match self.poll_node(node).await {
                Ok(()) => self.mark_reachable(node.name()).await,
                Err(error) => {
                    tracing::debug!(host = node.name(), %error, "a host does not report");
                    self.mark_unreachable(node.name()).await
                }
            };
            if let Err(error) = recorded {
                tracing::error!(host = node.name(), %error, "cannot record the state of a host");
            }
        }))
        .await;
    }

    /// Records a host as unreachable when it has not reported for some time. Its VMs may be running.
    async fn mark_unreachable(&self, host: &str) -> Result<()> {
        let last = self.reports().get(host).map(|last| last.at);
        if last.unwrap_or(self.started).elapsed() < SILENCE {
            return Ok(());
        }
        let vms = self.store.vms_of_host(host).await?;
        let ids: Vec<String> = vms
            .into_iter()
            .filter(|vm| matches!(vm.state, VmState::Running | VmState::Paused))
            .map(|vm| vm.id)
            .collect();
        if self.set_unreachable(host, true) {
            let detail = format!("does not answer; {} VMs are on it", ids.len());
            self.store
                .record_host_event("host.unreachable", host, &detail)
                .await?;
        }
        let reason = "its host does not answer; the VM may still be running";
        self.store
            .set_vm_states(&ids, VmState::Unreachable, reason)
            .await
    }

    async fn mark_reachable(&self, host: &str) -> Result<()> {
        match self.set_unreachable(host, false) {
            true => {
                self.store
                    .record_host_event("host.back", host, "answers")
                    .await
            }
            false => Ok(()),
        }
    }

    /// Returns whether that is a change.
    fn set_unreachable(&self, host: &str, unreachable: bool) -> bool {
        let mut all = self
            .unreachable
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match unreachable {
            true => all.insert(host.to_owned()),
            false => all.remove(host),
        }
    }

    /// Whether a host has reported lately.
    pub(crate) fn is_reachable(&self, host: &str) -> bool {
        let reports = self.reports();
        reports
            .get(host)
            .is_some_and(|last| last.at.elapsed() < SILENCE)
    }

    async fn poll_node(&self, node: &Node) -> Result<()> {
        let host = node.name();
        // Both are read before the host is asked: VMs that are placed meanwhile are not in its
        // report, and a VM that is being created now may be missing there although its creation
        // has finished when the report arrives.
        let known = self.store.vms_of_host(host).await?;
        let mut in_creation = self.admission.vms_in_creation();
        let deadline = deadlines::question(node.as_ref());
        let report = node.report(ReportRequest::default(), deadline).await?;
        // This precedes the database: a full disk of the controller does not make a host
        // unreachable.
        let last = LastReport {
            report: report.clone(),
            at: Instant::now(),
        };
        self.reports().insert(host.to_owned(), last);
        self.admission.host_measured(host);
        self.store
            .upsert_host_report(host, &report.capacity)
            .await?;
        // VMs that were added since may be in the report; whoever creates them records them.
        in_creation.extend(self.admission.vms_in_creation());
        let ended = self
            .store
            .apply_node_report(host, &report.vms, &in_creation)
            .await?;
        self.delete_unwanted(node, &known).await?;
        self.record_lost(host, known, &report, &in_creation).await?;
        self.clean_up(node, ended, &report).await
    }

    /// Ends VMs that were destroyed while their host was unreachable.
    async fn delete_unwanted(&self, node: &Node, known: &[PlacedVm]) -> Result<()> {
        for vm in known.iter().filter(|vm| !vm.wanted) {
            let request = DestroyVmRequest {
                vm: vm.id.clone(),
                reason: DESTROYED.to_owned(),
            };
            node.destroy_vm(request, deadlines::operation()).await?;
            self.store
                .set_vm_states(std::slice::from_ref(&vm.id), VmState::Ended, DESTROYED)
                .await?;
        }
        Ok(())
    }

    /// Records VMs as failed that their host does not know.
    async fn record_lost(
        &self,
        host: &str,
        known: Vec<PlacedVm>,
        report: &HostReport,
        in_creation: &HashSet<String>,
    ) -> Result<()> {
        let reported: HashSet<&str> = report.vms.iter().map(|vm| vm.id.as_str()).collect();
        let is_lost = |vm: &PlacedVm| {
            vm.wanted
                && !reported.contains(vm.id.as_str())
                && !in_creation.contains(&vm.id)
                && self.has_arrived(vm.state)
        };
        let lost = known.into_iter().filter(is_lost).map(|vm| vm.id);
        let mut lost: Vec<String> = lost.collect();
        if !lost.is_empty() {
            // A VM that was destroyed meanwhile is not lost.
            let now = self.store.vms_of_host(host).await?;
            lost.retain(|id| now.iter().any(|vm| vm.id == *id && vm.wanted));
        }
        let reason = "its host does not know the VM";
        self.store
            .set_vm_states(&lost, VmState::Failed, reason)
            .await
    }

    /// Whether the request to create a VM in this state must have arrived at its host. The request
    /// of an earlier process may take long, because the template is copied first.
    fn has_arrived(&self, state: VmState) -> bool {
        let grace = match self.cluster {
            Some(_) => CREATION,
            // The only node is in this process, and no older than it.
            None => Duration::ZERO,
        };
        state != VmState::Creating || self.started.elapsed() >= grace
    }

    /// Ends VMs on their host that have ended in the database, and lets the node forget them.
    async fn clean_up(&self, node: &Node, ended: Vec<String>, report: &HostReport) -> Result<()> {
        let running = report.vms.iter().filter(|vm| vm.state.is_alive());
        let running: HashSet<&str> = running.map(|vm| vm.id.as_str()).collect();
        for id in ended.iter().filter(|id| running.contains(id.as_str())) {
            let request = DestroyVmRequest {
                vm: id.clone(),
                reason: "the controller has recorded that it ended".to_owned(),
            };
            node.destroy_vm(request, deadlines::operation()).await?;
        }
        if ended.is_empty() {
            return Ok(());
        }
        let request = ForgetVmsRequest { vms: ended };
        Ok(node.forget_vms(request, deadlines::operation()).await?)
    }
}
