//! Hosts: joining, labels, draining, and what the scheduler sees of them.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use army_api::hosts::{ChangeHost, Host, HostState, MissingJailLayer};
use army_api::templates::{CpuFeatures, Template};
use army_node_api::Remote;
use army_node_api::cluster::token::Token;
use army_node_api::time::now_ms;

use crate::border::Checked;
use crate::error::RETRY_S;
use crate::scheduler::HostView;
use crate::{Cluster, Controller, Error, ErrorKind, LastReport, Node, Result, random};

/// The most labels of a host.
const MAX_LABELS: usize = 64;
/// The most characters of a label's key.
const MAX_KEY: usize = 63;
/// The most characters of a label's value.
const MAX_VALUE: usize = 255;

impl Controller {
    pub(crate) fn nodes(&self) -> Vec<Node> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.values().cloned().collect()
    }

    pub(crate) fn find_node(&self, host: &str) -> Option<Node> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(host).cloned()
    }

    pub(crate) fn node(&self, host: &str) -> Result<Node> {
        self.find_node(host).ok_or_else(|| {
            let message = format!("the host {host} is not connected");
            Error::new(ErrorKind::HostUnavailable, message).retry_after(RETRY_S)
        })
    }

    fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().ok_or_else(|| {
            let message = "this server has only its own host: it was started by `army dev`";
            Error::new(ErrorKind::Conflict, message)
                .advise("run `army controller` and an `army node` on each host")
        })
    }

    /// Creates a token with which one host can join within `minutes`. The second value is when the
    /// token expires, in milliseconds since 1970.
    pub async fn create_join_token(&self, minutes: u32) -> Result<(Token, u64)> {
        let cluster = self.cluster()?;
        let token = Token {
            secret: random::hex::<32>()?,
            fingerprint: cluster.fingerprint.clone(),
        };
        let expires_ms = now_ms() + u64::from(minutes) * 60_000;
        self.store.add_token(&token.secret, expires_ms).await?;
        Ok((token, expires_ms))
    }

    /// Adds a host that shows the secret of a token, and connects to its node at `address`. The
    /// token is used up.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthenticated`] where the token is not valid, and [`ErrorKind::Conflict`]
    /// where a host has this name.
    pub async fn enrol_host(&self, host: &str, address: SocketAddr, secret: &str) -> Result<()> {
        let remote = Remote::new(host, address, self.cluster()?.tls.clone())?;
        self.store
            .enrol_host(host, &address.to_string(), secret)
            .await?;
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.insert(host.to_owned(), Arc::new(Checked(Arc::new(remote))));
        Ok(())
    }

    /// Removes a host that has no VMs, or that does not answer.
    pub async fn remove_host(&self, name: &str) -> Result<()> {
        self.cluster()?;
        let host = self.host(name).await?;
        let vms = host.vms.unwrap_or(0);
        if host.state != HostState::Unreachable && vms > 0 {
            let message = format!("the host {name} has {vms} VMs");
            return Err(Error::new(ErrorKind::Conflict, message)
                .advise("drain the host, and destroy its VMs or wait for them to end"));
        }
        self.store.remove_host(name).await?;
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.remove(name);
        drop(nodes);
        self.reports().remove(name);
        Ok(())
    }

    /// One host.
    pub async fn host(&self, name: &str) -> Result<Host> {
        let hosts = self.hosts().await?;
        hosts
            .into_iter()
            .find(|host| host.name == name)
            .ok_or_else(|| {
                let message = format!("host `{}` not found", name.escape_debug());
                Error::new(ErrorKind::NotFound, message)
            })
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<Host>> {
        let counts = self.store.vms_by_host().await?;
        let rows = self.store.hosts().await?;
        let mut missing = self.missing_jail_layers();
        let mut notices = self.host_notices();
        Ok(rows
            .into_iter()
            .map(|row| {
                let is_connected = self.find_node(&row.name).is_some();
                let is_reachable = is_connected && self.is_reachable(&row.name);
                let (state, reason) = match (is_reachable, row.draining) {
                    (false, _) => (
                        HostState::Unreachable,
                        Some("the host has not reported for some time".to_owned()),
                    ),
                    (true, true) => (HostState::Draining, None),
                    (true, false) => (HostState::Ready, None),
                };
                Host {
                    vms: Some(counts.get(&row.name).copied().unwrap_or(0)),
                    missing_jail_layers: missing.remove(&row.name).unwrap_or_default(),
                    notices: notices.remove(&row.name).unwrap_or_default(),
                    name: row.name,
                    state,
                    reason,
                    labels: row.labels,
                    seen_ms: Some(row.seen_ms),
                    capacity: Some(row.capacity),
                }
            })
            .collect())
    }

    /// The layers that the jails of VMs lack by the last reports, by host.
    fn missing_jail_layers(&self) -> HashMap<String, Vec<MissingJailLayer>> {
        let reports = self.reports();
        let missing = reports.iter();
        missing
            .map(|(host, last)| (host.clone(), last.report.missing_jail_layers.clone()))
            .collect()
    }

    /// The notices of the last reports, by host.
    fn host_notices(&self) -> HashMap<String, Vec<String>> {
        let reports = self.reports();
        let notices = reports.iter();
        notices
            .map(|(host, last)| (host.clone(), last.report.notices.clone()))
            .collect()
    }

    /// Excludes a host from placement, or includes it again.
    pub async fn set_draining(&self, name: &str, draining: bool) -> Result<Host> {
        self.store.set_draining(name, draining).await?;
        self.host(name).await
    }

    /// Changes the labels of a host.
    pub async fn change_host(&self, name: &str, change: &ChangeHost) -> Result<Host> {
        let mut labels = self.host(name).await?.labels;
        for (key, value) in &change.labels {
            match value {
                Some(value) => labels.insert(key.clone(), value.clone()),
                None => labels.remove(key),
            };
        }
        let is_invalid = |text: &str, most: usize| text.is_empty() || text.chars().count() > most;
        if labels.len() > MAX_LABELS
            || labels
                .iter()
                .any(|(key, value)| is_invalid(key, MAX_KEY) || is_invalid(value, MAX_VALUE))
        {
            let message = format!(
                "at most {MAX_LABELS} labels, with keys of 1 to {MAX_KEY} characters and values of \
                 1 to {MAX_VALUE}"
            );
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        self.store.set_host_labels(name, &labels).await?;
        self.host(name).await
    }

    /// The hosts as they were last measured, for VMs of `template` that require `labels`.
    pub(crate) async fn host_views(
        &self,
        template: &Template,
        labels: &BTreeMap<String, String>,
    ) -> Result<Vec<HostView>> {
        let hosts = self.hosts().await?;
        let reports = self.reports();
        let views = hosts.into_iter().map(|host| {
            let last = reports.get(&host.name);
            let capacity = host.capacity.unwrap_or_default();
            let ready = last.and_then(|last| last.report.ready.get(&template.name).copied());
            HostView {
                suits: labels
                    .iter()
                    .all(|(key, value)| host.labels.get(key) == Some(value)),
                open: host.state == HostState::Ready,
                cpus: capacity.cpus,
                load_milli: capacity.load_milli,
                memory_bytes: capacity.memory_bytes,
                available_bytes: capacity.available_bytes,
                vms: host.vms.unwrap_or(0),
                lacks: lacks(template.cpu.as_ref(), last),
                has_template: template.hosts.contains(&host.name),
                ready: ready.unwrap_or(0),
                name: host.name,
            }
        });
        Ok(views.collect())
    }
}

/// The CPU features that clones need and the host lacks, as far as both are known. Where they are
/// not known, the host refuses the fork, and another host is tried.
fn lacks(needed: Option<&CpuFeatures>, last: Option<&LastReport>) -> Vec<String> {
    let host = last.and_then(|last| last.report.cpu.as_ref());
    let features = |cpu: &CpuFeatures| clone_api::control::CpuFeatures {
        vendor: cpu.vendor.clone(),
        features: cpu.features.clone(),
    };
    match (needed, host) {
        (Some(needed), Some(host)) => clone_start::cpu::missing(&features(needed), &features(host)),
        _ => Vec::new(),
    }
}
