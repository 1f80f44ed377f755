//! Hearing of hosts, and going over the difference between what is wanted and what is.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use army_api::vms::VmState;
use futures_util::future::join_all;

use super::{Controller, Heard, Node};
use crate::store::Result;
use army_node_api::blocking;

/// How often a host is asked.
const ROUND: Duration = Duration::from_secs(1);
/// A host is unreachable when nothing was heard of it for so long.
const SILENCE: Duration = Duration::from_secs(15);
/// A VM that an earlier life of ours was making, and of which its host knows nothing, is given up
/// when this life is so old: what that one asked for may still be on its way.
const CREATION: Duration = Duration::from_secs(60);

impl Controller {
    /// Takes up what an earlier life left: templates are kept ready again, and requests that were
    /// not answered are answered with what became of their VMs.
    pub async fn take_up_all(&self) -> Result<()> {
        self.hear_all().await;
        for template in self.store.templates().await? {
            if let Err(problem) = self.keep(&template).await {
                tracing::warn!(template = template.name, %problem, "cannot keep standbys ready");
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
            self.hear_all().await;
            tokio::time::sleep(ROUND).await;
        }
    }

    /// Hears of all hosts, side by side: one that does not answer must not keep others waiting.
    async fn hear_all(&self) {
        let nodes = self.nodes();
        join_all(nodes.iter().map(|node| async {
            let told = match self.hear(node).await {
                Ok(()) => self.tell_return(node.name()).await,
                Err(problem) => {
                    tracing::debug!(host = node.name(), %problem, "a host does not report");
                    self.tell_silence(node.name()).await
                }
            };
            if let Err(problem) = told {
                tracing::error!(host = node.name(), %problem, "cannot record the state of a host");
            }
        }))
        .await;
    }

    /// Notes that nothing is heard of a host, when that has lasted. Its VMs may well run.
    async fn tell_silence(&self, host: &str) -> Result<()> {
        let heard = self.heard().get(host).map(|heard| heard.at);
        if heard.unwrap_or(self.started).elapsed() < SILENCE {
            return Ok(());
        }
        let vms = self.store.vms_of_host(host).await?;
        let ids: Vec<String> = vms
            .into_iter()
            .filter(|(_, state, _)| matches!(state, VmState::Running | VmState::Paused))
            .map(|(id, ..)| id)
            .collect();
        if self.set_silent(host, true) {
            let detail = format!("does not answer; {} VMs are on it", ids.len());
            self.store
                .note_host("host.unreachable", host, &detail)
                .await?;
        }
        let reason = "its host does not answer; the VM may still be running";
        self.store.set_vms(&ids, VmState::Unreachable, reason).await
    }

    /// Whether a host was heard of lately.
    pub(super) fn is_heard(&self, host: &str) -> bool {
        let heard = self.heard();
        heard.get(host).is_some_and(|it| it.at.elapsed() < SILENCE)
    }

    async fn tell_return(&self, host: &str) -> Result<()> {
        match self.set_silent(host, false) {
            true => self.store.note_host("host.back", host, "answers").await,
            false => Ok(()),
        }
    }

    /// Returns whether that is a change.
    fn set_silent(&self, host: &str, silent: bool) -> bool {
        let mut all = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match silent {
            true => all.insert(host.to_owned()),
            false => all.remove(host),
        }
    }

    async fn hear(&self, node: &Node) -> Result<()> {
        let host = node.name().to_owned();
        // Before the host is asked: what is placed meanwhile is not in its answer, nor is what was
        // still being made then, done though it may be when the answer is here.
        let known = self.store.vms_of_host(&host).await?;
        let mut making = self.making.vms();
        let asked = Arc::clone(node);
        let report = blocking(move || asked.report()).await?;
        // Before anything is written: that our disk is full does not make it silent.
        let heard = Heard {
            report: report.clone(),
            at: Instant::now(),
        };
        self.heard().insert(host.clone(), heard);
        self.making.measured(&host);
        self.store.see_host(&host, &report.capacity).await?;
        // What came since may be in the answer, and is told of by whoever makes it.
        making.extend(self.making.vms());
        let over = self.store.hear_of_vms(&host, &report.vms, &making).await?;
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
            } else if !there.contains(id.as_str()) && !making.contains(&id) && self.is_over(state) {
                lost.push(id);
            }
        }
        if !lost.is_empty() {
            // One that was destroyed meanwhile is not lost.
            let now = self.store.vms_of_host(&host).await?;
            lost.retain(|id| now.iter().any(|(it, _, wanted)| it == id && *wanted));
        }
        let reason = "its host does not know the VM";
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
                node.destroy(id, "the controller has recorded that it ended")?;
            }
            match over.is_empty() {
                true => Ok(()),
                false => node.forget(&over),
            }
        })
        .await?;
        Ok(())
    }

    /// Whether a VM that its host does not know, and that we do not make, is lost, and not only on
    /// its way for an earlier life of ours: its template may have a long way to go.
    fn is_over(&self, state: VmState) -> bool {
        // A node of this process began its life with us.
        let grace = match self.cluster {
            Some(_) => CREATION,
            None => Duration::ZERO,
        };
        state != VmState::Creating || self.started.elapsed() >= grace
    }
}
