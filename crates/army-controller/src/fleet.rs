//! Hosts: who they are, what they have, and whether they take VMs.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use army_api::hosts::{ChangeHost, Host, HostState, MissingJailLayer};
use army_api::templates::{CpuFeatures, Template};
use army_api::{Problem, ProblemKind};

use super::{Cluster, Controller, Heard, Node};
use crate::random;
use crate::scheduler::HostView;
use crate::store::Result;
use army_node_api::cluster::token::Token;
use army_node_api::remote::Remote;
use army_node_api::time::now_ms;

/// The most labels of a host, and the most characters of each part of one.
const MAX_LABELS: usize = 64;
const MAX_LABEL: usize = 200;

impl Controller {
    pub(super) fn nodes(&self) -> Vec<Node> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.values().cloned().collect()
    }

    pub(super) fn find_node(&self, host: &str) -> Option<Node> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(host).cloned()
    }

    pub(super) fn node(&self, host: &str) -> Result<Node> {
        self.find_node(host).ok_or_else(|| {
            let detail = format!("the host {host} is not connected");
            Problem::new(ProblemKind::HostUnavailable, detail).retry_after(5)
        })
    }

    pub(super) fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().ok_or_else(|| {
            let detail = "this server has only its own host: it was started by `army dev`";
            Problem::new(ProblemKind::Conflict, detail)
                .advise("run `army controller` and an `army node` on each host")
        })
    }

    /// Takes up a host that has just enrolled.
    pub fn connect(&self, host: &str, address: SocketAddr) -> Result<()> {
        let remote = Remote::new(host, address, self.cluster()?.tls.clone())?;
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.insert(host.to_owned(), Arc::new(remote));
        Ok(())
    }

    /// A token that a host joins with, once, within `minutes`; and when it ends, in milliseconds
    /// since 1970.
    pub async fn token(&self, minutes: u32) -> Result<(Token, u64)> {
        let cluster = self.cluster()?;
        let token = Token {
            secret: random::hex::<32>()?,
            fingerprint: cluster.fingerprint.clone(),
        };
        let expires_ms = now_ms() + u64::from(minutes) * 60_000;
        self.store.add_token(&token.secret, expires_ms).await?;
        Ok((token, expires_ms))
    }

    /// Gives a host up. One that answers and has VMs keeps them, and stays.
    pub async fn remove_host(&self, name: &str) -> Result<()> {
        self.cluster()?;
        let host = self.host(name).await?;
        if host.state != HostState::Unreachable && host.vms > 0 {
            let detail = format!("the host {name} has {} VMs", host.vms);
            return Err(Problem::new(ProblemKind::Conflict, detail)
                .advise("drain the host, and destroy its VMs or wait for them to end"));
        }
        self.store.remove_host(name).await?;
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.remove(name);
        drop(nodes);
        self.heard().remove(name);
        Ok(())
    }

    /// One host.
    pub async fn host(&self, name: &str) -> Result<Host> {
        let hosts = self.hosts().await?;
        hosts
            .into_iter()
            .find(|host| host.name == name)
            .ok_or_else(|| {
                let detail = format!("host `{}` not found", name.escape_debug());
                Problem::new(ProblemKind::NotFound, detail)
            })
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<Host>> {
        let counts = self.store.vms_by_host().await?;
        let rows = self.store.hosts().await?;
        let mut missing = self.missing_jail_layers();
        Ok(rows
            .into_iter()
            .map(|row| {
                let here = self.find_node(&row.name).is_some();
                let (state, reason) = match (here && self.is_heard(&row.name), row.draining) {
                    (false, _) => (
                        HostState::Unreachable,
                        Some("the host has not reported for some time".to_owned()),
                    ),
                    (true, true) => (HostState::Draining, None),
                    (true, false) => (HostState::Ready, None),
                };
                Host {
                    vms: counts.get(&row.name).copied().unwrap_or(0),
                    missing_jail_layers: missing.remove(&row.name).unwrap_or_default(),
                    name: row.name,
                    state,
                    reason,
                    labels: row.labels,
                    seen_ms: row.seen_ms,
                    capacity: row.capacity,
                }
            })
            .collect())
    }

    /// The layers that the jail of VMs lacks, by host, as last heard.
    fn missing_jail_layers(&self) -> HashMap<String, Vec<MissingJailLayer>> {
        let heard = self.heard();
        let missing = heard.iter();
        missing
            .map(|(host, heard)| (host.clone(), heard.report.missing_jail_layers.clone()))
            .collect()
    }

    /// Changes what a host is labelled with.
    pub async fn change_host(&self, name: &str, asked: &ChangeHost) -> Result<Host> {
        let mut labels = self.host(name).await?.labels;
        for (key, value) in &asked.labels {
            match value {
                Some(value) => labels.insert(key.clone(), value.clone()),
                None => labels.remove(key),
            };
        }
        let too_long = |text: &String| text.is_empty() || text.chars().count() > MAX_LABEL;
        if labels.len() > MAX_LABELS
            || labels
                .iter()
                .any(|(key, value)| too_long(key) || too_long(value))
        {
            let detail = format!(
                "at most {MAX_LABELS} labels, with keys and values of 1 to {MAX_LABEL} characters"
            );
            return Err(Problem::new(ProblemKind::InvalidRequest, detail));
        }
        self.store.label_host(name, &labels).await?;
        self.host(name).await
    }

    /// The hosts as they were measured, for VMs of `template` that want `labels` of theirs.
    pub(super) async fn views(
        &self,
        template: &Template,
        labels: &BTreeMap<String, String>,
    ) -> Result<Vec<HostView>> {
        let hosts = self.hosts().await?;
        let heard = self.heard();
        let views = hosts.into_iter().map(|host| {
            let heard = heard.get(&host.name);
            let ready = heard.and_then(|heard| heard.report.ready.get(&template.name).copied());
            HostView {
                suits: labels
                    .iter()
                    .all(|(key, value)| host.labels.get(key) == Some(value)),
                open: host.state == HostState::Ready,
                cpus: host.capacity.cpus,
                load_milli: host.capacity.load_milli,
                memory_bytes: host.capacity.memory_bytes,
                available_bytes: host.capacity.available_bytes,
                vms: host.vms,
                lacks: lacks(template.cpu.as_ref(), heard),
                has_template: template.hosts.contains(&host.name),
                ready: ready.unwrap_or(0),
                name: host.name,
            }
        });
        Ok(views.collect())
    }
}

/// What a host lacks of the CPU features that clones need, as far as it is known.
fn lacks(needed: Option<&CpuFeatures>, heard: Option<&Heard>) -> Vec<String> {
    let host = heard.and_then(|heard| heard.report.cpu.as_ref());
    let features = |cpu: &CpuFeatures| clone_api::control::CpuFeatures {
        vendor: cpu.vendor.clone(),
        features: cpu.features.clone(),
    };
    match (needed, host) {
        (Some(needed), Some(host)) => clone::cpu::missing(&features(needed), &features(host)),
        // Where it turns out to lack some, the fork is refused there and tried elsewhere.
        _ => Vec::new(),
    }
}
