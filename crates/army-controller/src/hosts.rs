//! Hosts: joining, labels, draining, and what the scheduler sees of them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use army_api::hosts::{ChangeHost, Host, HostState};
use army_api::operations::OperationKind;
use army_api::templates::{CpuFeatures, Template};
use army_node_api::cluster::token::Token;
use army_node_api::time::now_ms;

use crate::error::RETRY_S;
use crate::operations::{Outcome, Output, Requester, StartedOperation, detached};
use crate::scheduler::HostView;
use crate::store::hosts::HostRow;
pub use crate::store::hosts::Joining;
use crate::store::reservations::Reservation;
use crate::{Cluster, Controller, Error, ErrorKind, LastReport, Node, Result, random};

/// A host is unreachable when it has not reported for so long.
const SILENCE: Duration = Duration::from_secs(15);
/// The number of digits of a join token's secret.
const SECRET_LEN: usize = 64;
/// The most labels of a host.
const MAX_LABELS: usize = 64;
/// The most characters of a label's key.
const MAX_KEY: usize = 63;
/// The most characters of a label's value.
const MAX_VALUE: usize = 255;

impl Controller {
    pub(crate) fn nodes(&self) -> Vec<Node> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.values().map(|it| Node::clone(&it.node)).collect()
    }

    pub(crate) fn find_node(&self, host: &str) -> Option<Node> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(host).map(|it| Node::clone(&it.node))
    }

    pub(crate) fn node(&self, host: &str) -> Result<Node> {
        self.find_node(host).ok_or_else(|| {
            let message = format!("the host {host} is not connected");
            Error::new(ErrorKind::HostUnavailable, message).retry_after(RETRY_S)
        })
    }

    pub(crate) fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().ok_or_else(|| {
            let message = "this server has only its own host: it was started by `army dev`";
            Error::new(ErrorKind::Conflict, message)
                .advise("run `army controller` and an `army node` on each host")
        })
    }

    /// Creates a token with which one host can join within `minutes`. The second value is when the
    /// token expires, in milliseconds since 1970.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where `requester` has sent the request before: the token was in the
    /// first answer only.
    pub async fn create_join_token(
        &self,
        requester: &Requester,
        minutes: u32,
    ) -> Result<(Token, u64)> {
        let cluster = self.cluster()?;
        let token = Token {
            secret: random::hex::<32>()?,
            fingerprint: cluster.fingerprint.clone(),
        };
        let expires_ms = now_ms() + u64::from(minutes) * 60_000;
        let kind = OperationKind::CreateJoinToken;
        let new = self.new_request(requester, kind, "a token", &minutes, &minutes)?;
        self.store
            .add_token(&token.secret, expires_ms, Some(new.operation()))
            .await?;
        Ok((token, expires_ms))
    }

    /// Checks that a host could join with the secret of a token, before anything is done for it.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthenticated`] where the token is unknown or has expired.
    pub async fn check_join_token(&self, secret: &str) -> Result<()> {
        let is_secret =
            secret.len() == SECRET_LEN && secret.bytes().all(|it| it.is_ascii_hexdigit());
        if is_secret && self.store.has_token(secret).await? {
            return Ok(());
        }
        let message = "the token is unknown, or has expired";
        Err(Error::new(ErrorKind::Unauthenticated, message)
            .advise("create another one: army host token"))
    }

    /// Adds a host that shows the secret of a token, connects to its node, and returns the host's
    /// certificate. The token is used up, but for the same host with the same signing request.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthenticated`] where the token is not valid, and [`ErrorKind::Conflict`]
    /// where a host has this name.
    pub async fn enrol_host(&self, joining: &Joining<'_>) -> Result<String> {
        self.cluster()?;
        let certificate = self.store.enrol_host(joining).await?;
        self.host_rows().await?;
        self.fleet_changed.notify_one();
        Ok(certificate)
    }

    /// Connects to the node of a host at its present address, which the node itself has told.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the host was removed.
    pub async fn move_host(&self, host: &str, address: SocketAddr) -> Result<()> {
        if self.find_node(host).and_then(|node| node.address()) == Some(address) {
            return Ok(());
        }
        self.cluster()?;
        self.store.set_host_address(host, address).await?;
        self.host_rows().await?;
        self.fleet_changed.notify_one();
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
        self.host_rows().await?;
        self.forget_host(name);
        self.fleet_changed.notify_one();
        Ok(())
    }

    /// One host.
    pub async fn host(&self, name: &str) -> Result<Host> {
        let rows = self.host_rows().await?;
        let row = find(&rows, name)?;
        let vms = self.store.count_vms_of_host(name).await?;
        Ok(self.described(row, &self.reports(), vms))
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<Host>> {
        let counts = self.store.vms_by_host().await?;
        let rows = self.host_rows().await?;
        let reports = self.reports();
        let hosts = rows.iter().map(|row| {
            let vms = counts.get(&row.name).copied().unwrap_or(0);
            self.described(row, &reports, vms)
        });
        Ok(hosts.collect())
    }

    /// A host as users see it, which has so many VMs that have not ended.
    fn described(&self, row: &HostRow, reports: &HashMap<String, LastReport>, vms: u32) -> Host {
        let last = self.own_report(reports, row);
        let report = last.map(|last| &last.report);
        let state = self.host_state(row, last);
        let reason = "the host has not reported for some time";
        Host {
            name: row.name.clone(),
            state,
            reason: (state == HostState::Unreachable).then(|| reason.to_owned()),
            labels: row.labels.clone(),
            seen_ms: Some(last.map_or(row.seen_ms, |last| last.seen_ms)),
            capacity: Some(report.map_or(row.capacity, |it| it.capacity)),
            vms: Some(vms),
            missing_jail_layers: match report {
                Some(report) => report.missing_jail_layers.clone(),
                None => row.facts.missing_jail_layers.clone(),
            },
            notices: match report {
                Some(report) => report.notices.clone(),
                None => row.facts.notices.clone(),
            },
        }
    }

    /// The last report of a host, where this controller owns the host.
    fn own_report<'a>(
        &self,
        reports: &'a HashMap<String, LastReport>,
        row: &HostRow,
    ) -> Option<&'a LastReport> {
        reports.get(&row.name).filter(|_| self.is_own(row))
    }

    /// The state of a host: by its last report where this controller has its reports, and else by
    /// what its owner has recorded.
    fn host_state(&self, row: &HostRow, last: Option<&LastReport>) -> HostState {
        let is_reachable = match self.is_own(row) {
            true => last.is_some_and(LastReport::is_recent),
            false => row.is_reachable,
        };
        match (is_reachable, row.draining) {
            (false, _) => HostState::Unreachable,
            (true, true) => HostState::Draining,
            (true, false) => HostState::Ready,
        }
    }

    /// Begins to exclude a host from placement, or to include it again.
    pub async fn set_draining(
        self: &Arc<Self>,
        requester: &Requester,
        name: &str,
        draining: bool,
    ) -> Result<StartedOperation> {
        // A host that there is not is no operation.
        find(&self.host_rows().await?, name)?;
        let kind = match draining {
            true => OperationKind::DrainHost,
            false => OperationKind::UndrainHost,
        };
        let new = self.new_request(requester, kind, name, &name, &())?;
        let (controller, name) = (Arc::clone(self), name.to_owned());
        detached(async move {
            let work =
                |controller: Arc<Self>| async move { controller.drain(&name, draining).await };
            controller
                .begin_and_carry_out(new, Reservation::default(), work)
                .await
        })
        .await
    }

    /// Excludes a host from placement, or includes it again.
    pub(crate) async fn drain(&self, name: &str, draining: bool) -> Outcome {
        self.store.set_draining(name, draining).await?;
        Ok(Output::Host(Box::new(self.host(name).await?)))
    }

    /// Changes the labels of a host.
    pub async fn change_host(&self, name: &str, change: &ChangeHost) -> Result<Host> {
        let mut labels = find(&self.host_rows().await?, name)?.labels.clone();
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
        let rows = self.host_rows().await?;
        let holders: HashSet<&str> = template.hosts.iter().map(String::as_str).collect();
        let reports = self.reports();
        let views = rows.iter().map(|row| {
            let last = self.own_report(&reports, row);
            let capacity = last.map_or(row.capacity, |last| last.report.capacity);
            let cpu = match last {
                Some(last) => last.report.cpu.as_ref(),
                None => row.facts.cpu.as_ref(),
            };
            let ready = match last {
                Some(last) => last.report.ready.get(template.stored_as()),
                None => row.facts.ready.get(template.stored_as()),
            };
            HostView {
                suits: labels
                    .iter()
                    .all(|(key, value)| row.labels.get(key) == Some(value)),
                open: self.host_state(row, last) == HostState::Ready,
                cpus: capacity.cpus,
                load_milli: capacity.load_milli,
                memory_bytes: capacity.memory_bytes,
                available_bytes: capacity.available_bytes,
                promised_bytes: capacity.promised_bytes,
                promise_limit_bytes: self.limits.promise_limit(capacity.memory_bytes),
                // A host that does not say how much is free says 0.
                disk_free_bytes: Some(capacity.disk_free_bytes).filter(|free| *free > 0),
                run_free_bytes: capacity.run_free_bytes,
                vms: last.map_or(row.facts.vms, |last| last.vms),
                lacks: lacks(template.cpu.as_ref(), cpu),
                has_template: holders.contains(row.name.as_str()),
                ready: ready.copied().unwrap_or(0),
                name: row.name.clone(),
            }
        });
        Ok(views.collect())
    }

    /// The number of standbys of a template that are ready on all hosts.
    pub(crate) fn ready_standbys(&self, rows: &[HostRow], template: &str) -> u32 {
        let reports = self.reports();
        let ready = rows
            .iter()
            .filter_map(|row| match self.own_report(&reports, row) {
                Some(last) => last.report.ready.get(template),
                None => row.facts.ready.get(template),
            });
        ready.sum()
    }
}

/// The record of a host.
fn find<'a>(rows: &'a [HostRow], name: &str) -> Result<&'a HostRow> {
    rows.iter().find(|row| row.name == name).ok_or_else(|| {
        let message = format!("host `{}` not found", name.escape_debug());
        Error::new(ErrorKind::NotFound, message)
    })
}

impl LastReport {
    /// Whether the report is recent enough for the host to count as reachable.
    pub(crate) fn is_recent(&self) -> bool {
        is_recent(self.at)
    }
}

/// Whether a host whose last sign of life was then counts as reachable.
pub(crate) fn is_recent(at: Instant) -> bool {
    at.elapsed() < SILENCE
}

/// The CPU features that clones need and the host lacks, as far as both are known. Where they are
/// not known, the host refuses the fork, and another host is tried.
fn lacks(needed: Option<&CpuFeatures>, host: Option<&CpuFeatures>) -> Vec<String> {
    let features = |cpu: &CpuFeatures| clone_api::control::CpuFeatures {
        vendor: cpu.vendor.clone(),
        features: cpu.features.clone(),
    };
    match (needed, host) {
        (Some(needed), Some(host)) => clone_start::cpu::missing(&features(needed), &features(host)),
        _ => Vec::new(),
    }
}
