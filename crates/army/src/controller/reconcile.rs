//! Hearing of hosts, and going over the difference between what is wanted and what is.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use army_api::vms::VmState;

use super::{Controller, Heard};
use crate::blocking;
use crate::node::Node;
use crate::node::supervise::now_ms;
use crate::store::Result;

/// How often a host is asked.
const ROUND: Duration = Duration::from_secs(1);
/// A host is unreachable when nothing was heard of it for so long.
pub(super) const SILENCE_MS: u64 = 15_000;
/// A VM that is said to be made by an earlier life of ours, and of which its host knows nothing, is
/// given up after so long.
const CREATION_MS: u64 = 60_000;

impl Controller {
    /// Takes up what an earlier life left: templates are kept ready again, and requests that were
    /// not answered are answered with what became of their VMs.
    pub async fn take_up_all(&self) -> Result<()> {
        for node in self.nodes.values() {
            self.hear(node).await?;
        }
        for template in self.store.templates().await? {
            if let Err(problem) = self.keep(&template).await {
                tracing::warn!(template = template.name, %problem, "a template is not kept ready");
            }
        }
        for (tenant, request) in self.store.unanswered_requests().await? {
            let vms = self.store.vms_of_request(&tenant, &request).await?;
            if vms.is_empty() {
                self.store.drop_request(&tenant, &request).await?;
                continue;
            }
            let created = army_api::vms::CreatedVms {
                vms,
                failures: Vec::new(),
            };
            let answer = serde_json::to_string(&created).unwrap_or_default();
            self.store
                .answer_request(&tenant, &request, &answer)
                .await?;
        }
        Ok(())
    }

    /// Goes over all hosts, again and again.
    pub async fn reconcile(self: Arc<Self>) {
        loop {
            for node in self.nodes.values() {
                if let Err(problem) = self.hear(node).await {
                    tracing::error!(host = node.name(), %problem, "cannot hear of a host");
                }
            }
            tokio::time::sleep(ROUND).await;
        }
    }

    async fn hear(&self, node: &Arc<Node>) -> Result<()> {
        let host = node.name().to_owned();
        // Before the host is asked: what is placed meanwhile is not in its answer.
        let known = self.store.vms_of_host(&host).await?;
        let asked = Arc::clone(node);
        let report = blocking(move || Ok(asked.report())).await?;
        self.store.see_host(&host, &report.capacity).await?;
        let over = self.store.hear_of_vms(&host, &report.vms).await?;
        let there: HashSet<&str> = report.vms.iter().map(|vm| vm.id.as_str()).collect();
        let mut lost = Vec::new();
        for (id, state, wanted) in known {
            if !wanted {
                // Its host was away when it was to go.
                let node = Arc::clone(node);
                let gone = id.clone();
                blocking(move || node.destroy(&gone, "destroyed")).await?;
                self.store
                    .set_vms(&[id], VmState::Ended, "destroyed")
                    .await?;
            } else if !there.contains(id.as_str()) && self.is_lost(&id, state).await? {
                lost.push(id);
            }
        }
        let reason = "its host knows nothing of it";
        self.store.set_vms(&lost, VmState::Failed, reason).await?;
        let node = Arc::clone(node);
        let alive: HashSet<String> = report
            .vms
            .iter()
            .filter(|vm| vm.state.is_alive())
            .map(|vm| vm.id.clone())
            .collect();
        blocking(move || {
            for id in over.iter().filter(|id| alive.contains(*id)) {
                node.destroy(id, "it was over by the controller's book")?;
            }
            node.forget(&over);
            Ok(())
        })
        .await?;
        let heard = Heard {
            report,
            at: Instant::now(),
            promised: 0,
        };
        tracing::trace!(host, at = ?heard.at, "heard");
        self.heard().insert(host, heard);
        Ok(())
    }

    /// Whether a VM that its host does not know is lost, and not only on its way.
    async fn is_lost(&self, id: &str, state: VmState) -> Result<bool> {
        if state != VmState::Creating {
            return Ok(true);
        }
        let vm = self.store.vm(id, None).await?;
        Ok(now_ms().saturating_sub(vm.created_ms) > CREATION_MS)
    }
}
