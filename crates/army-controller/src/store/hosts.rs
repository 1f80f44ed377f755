//! Hosts, by their last reports, and the tokens with which hosts join.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use army_api::hosts::{Capacity, MissingJailLayer};
use army_api::templates::CpuFeatures;
use army_api::vms::VmState;
use serde::{Deserialize, Serialize};

use super::{Change, Store, is_taken, json, number, parse, query_failed, stored, text, to_json};
use crate::store::keys::hash;
use crate::store::operations::NewOperation;
use crate::store::vm_states::StateChange;
use crate::{Error, ErrorKind, Result};
use army_node_api::time::now_ms;

/// The record of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostRow {
    /// The host's name.
    pub(crate) name: String,
    /// The host's labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// Whether the host is excluded from placement.
    pub(crate) draining: bool,
    /// When the host last reported, in milliseconds since 1970.
    pub(crate) seen_ms: u64,
    /// The capacity in its last report.
    pub(crate) capacity: Capacity,
    /// The address where its node listens; `None` for a node in this process.
    pub(crate) address: Option<SocketAddr>,
    /// The controller that runs the host's task; `None` where none does.
    pub(crate) owner: Option<String>,
    /// The epoch of the host.
    pub(crate) epoch: u64,
    /// Whether the owner has reports of the host.
    pub(crate) is_reachable: bool,
    /// What else was last recorded of its reports.
    pub(crate) facts: HostFacts,
}

/// What controllers other than the owner need to know of a host's last report, beside its capacity.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct HostFacts {
    /// The number of VMs that have not ended.
    pub(crate) vms: u32,
    /// The number of standbys that are ready, by the template's name.
    pub(crate) ready: BTreeMap<String, u32>,
    /// The CPU features that clones can have on the host.
    pub(crate) cpu: Option<CpuFeatures>,
    /// The layers that the jail of the host's VMs lacks.
    pub(crate) missing_jail_layers: Vec<MissingJailLayer>,
    /// What an administrator should know about the host.
    pub(crate) notices: Vec<String>,
}

/// What an owner has measured of a host.
pub(crate) struct Measured {
    /// The host's name.
    pub(crate) host: String,
    /// When the host reported, in milliseconds since 1970.
    pub(crate) seen_ms: u64,
    /// What the host has, and how much of it is left.
    pub(crate) capacity: Capacity,
    /// What else it reported.
    pub(crate) facts: HostFacts,
}

impl Store {
    /// Records what was measured of hosts. That is no event.
    pub(crate) async fn record_measured(&self, measured: &[Measured]) -> Result<()> {
        if measured.is_empty() {
            return Ok(());
        }
        let mut change = self.change().await?;
        for it in measured {
            sqlx::query(
                "UPDATE hosts SET seen_ms = $1, capacity = $2, facts = $3 \
                 WHERE name = $4 AND owner = $5",
            )
            .bind(stored(it.seen_ms))
            .bind(to_json(&it.capacity)?)
            .bind(to_json(&it.facts)?)
            .bind(&it.host)
            .bind(&self.term().id)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        }
        change.commit().await
    }

    /// Records whether the owner has reports of a host. Where that is a change, it is an event with
    /// this detail. Returns whether it is.
    pub(crate) async fn set_reachable(
        &self,
        name: &str,
        is_reachable: bool,
        detail: &str,
    ) -> Result<bool> {
        let mut change = self.change().await?;
        let changed = sqlx::query(
            "UPDATE hosts SET reachable = $1 WHERE name = $2 AND reachable <> $1 \
             RETURNING seen_ms",
        )
        .bind(i64::from(is_reachable))
        .bind(name)
        .fetch_optional(change.connection())
        .await
        .map_err(query_failed)?;
        if let Some(row) = &changed {
            // The first report of a host is not its return.
            match is_reachable {
                true if number(row, "seen_ms")? == 0 => {}
                true => change.event("host.back", name, "", detail).await?,
                false => change.event("host.unreachable", name, "", detail).await?,
            }
        }
        change.commit().await?;
        Ok(changed.is_some())
    }

    /// Adds a token with which a host may join until `expires_ms`. With an operation, that is recorded
    /// as ended.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the request is a repetition.
    pub(crate) async fn add_token(
        &self,
        secret: &str,
        expires_ms: u64,
        operation: Option<&NewOperation>,
    ) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("DELETE FROM join_tokens WHERE expires_ms < $1")
            .bind(stored(now_ms()))
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        sqlx::query("INSERT INTO join_tokens (hash, expires_ms) VALUES ($1, $2)")
            .bind(hash(secret))
            .bind(stored(expires_ms))
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if let Some(operation) = operation {
            change.record_made(operation, "a token").await?;
        }
        change.commit().await
    }

    /// Whether a token is known and has not expired. It may have been used.
    pub(crate) async fn has_token(&self, secret: &str) -> Result<bool> {
        let row = sqlx::query("SELECT hash FROM join_tokens WHERE hash = $1 AND expires_ms >= $2")
            .bind(hash(secret))
            .bind(stored(now_ms()))
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(row.is_some())
    }

    /// Adds a host that shows the secret of a token, which is used then, and returns its
    /// certificate. A host that has lost the answer and shows the same token and the same signing
    /// request again gets the certificate of the first time.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthenticated`] where the token is not valid, and [`ErrorKind::Conflict`] where
    /// a host has this name.
    pub(crate) async fn enrol_host(&self, joining: &Joining<'_>) -> Result<String> {
        let mut change = self.change().await?;
        let used = sqlx::query(
            "UPDATE join_tokens SET host = $1, request_hash = $2, certificate = $3 \
             WHERE hash = $4 AND expires_ms >= $5 AND host IS NULL",
        )
        .bind(joining.host)
        .bind(hash(joining.request))
        .bind(joining.certificate)
        .bind(hash(joining.secret))
        .bind(stored(now_ms()))
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        if used.rows_affected() == 0 {
            return enrol_again(change, joining).await;
        }
        // The host is this controller's until it is somebody else's turn.
        let now = change.clock().await?;
        sqlx::query(
            "INSERT INTO hosts (name, labels, draining, seen_ms, capacity, address, owner, epoch) \
             VALUES ($1, '{}', 0, 0, $2, $3, $4, $5)",
        )
        .bind(joining.host)
        .bind(to_json(&Capacity::default())?)
        .bind(joining.address.to_string())
        .bind(&self.term().id)
        .bind(now)
        .execute(change.connection())
        .await
        .map_err(|error| match is_taken(&error) {
            true => {
                let message = format!("a host named `{}` already exists", joining.host);
                Error::new(ErrorKind::Conflict, message)
                    .advise("use another name, or remove that host: army host rm")
            }
            false => query_failed(error),
        })?;
        let detail = format!("joined, at {}", joining.address);
        change
            .event("host.joined", joining.host, "", &detail)
            .await?;
        change.commit().await?;
        self.note_host_change();
        Ok(joining.certificate.to_owned())
    }

    /// Records that the node of a host listens at another address.
    pub(crate) async fn set_host_address(&self, name: &str, address: SocketAddr) -> Result<()> {
        let mut change = self.change().await?;
        set_address(&mut change, name, address).await?;
        let detail = format!("is at {address} now");
        change.event("host.moved", name, "", &detail).await?;
        change.commit().await?;
        self.note_host_change();
        Ok(())
    }

    /// Removes a host and its copies of templates, and records its VMs as failed.
    pub(crate) async fn remove_host(&self, name: &str) -> Result<()> {
        let mut change = self.change().await?;
        for query in [
            "DELETE FROM hosts WHERE name = $1",
            "DELETE FROM template_copies WHERE host = $1",
        ] {
            sqlx::query(query)
                .bind(name)
                .execute(change.connection())
                .await
                .map_err(query_failed)?;
        }
        let vms = sqlx::query("SELECT id FROM vms WHERE host = $1 AND alive = 1")
            .bind(name)
            .fetch_all(change.connection())
            .await
            .map_err(query_failed)?;
        for vm in vms {
            let failed = StateChange {
                id: &text(&vm, "id")?,
                state: VmState::Failed,
                reason: Some("its host was removed"),
                unless_changed_since: None,
            };
            change.change_vm_state(&failed).await?;
        }
        change.event("host.removed", name, "", "removed").await?;
        change.commit().await?;
        self.note_host_change();
        Ok(())
    }

    /// All hosts, by name.
    pub(crate) async fn hosts(&self) -> Result<Vec<HostRow>> {
        // As one text, because rows are slow, and controllers read all hosts often.
        let query = match self.is_postgres {
            true => {
                "SELECT CAST(COALESCE(json_agg(json_build_object('name', name, 'labels', labels, \
                 'draining', draining, 'seen_ms', seen_ms, 'capacity', capacity, 'address', address, \
                 'owner', owner, 'epoch', epoch, 'reachable', reachable, 'facts', facts)), '[]') \
                 AS TEXT) AS hosts FROM (SELECT * FROM hosts ORDER BY name) AS them"
            }
            false => {
                "SELECT CAST(json_group_array(json_object('name', name, 'labels', labels, \
                 'draining', draining, 'seen_ms', seen_ms, 'capacity', capacity, 'address', address, \
                 'owner', owner, 'epoch', epoch, 'reachable', reachable, 'facts', facts)) \
                 AS TEXT) AS hosts FROM (SELECT * FROM hosts ORDER BY name) AS them"
            }
        };
        let row = sqlx::query(query)
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        let listed: Vec<Listed> = json(&row, "hosts")?;
        Ok(listed.into_iter().filter_map(Listed::readable).collect())
    }

    /// Replaces the labels of a host.
    pub(crate) async fn set_host_labels(
        &self,
        name: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE hosts SET labels = $1 WHERE name = $2")
            .bind(to_json(labels)?)
            .bind(name)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await?;
        self.note_host_change();
        Ok(())
    }

    /// Excludes a host from placement, or includes it again.
    pub(crate) async fn set_draining(&self, name: &str, draining: bool) -> Result<()> {
        let mut change = self.change().await?;
        let changed = sqlx::query("UPDATE hosts SET draining = $1 WHERE name = $2")
            .bind(i64::from(draining))
            .bind(name)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if changed.rows_affected() == 0 {
            let message = format!("host `{}` not found", name.escape_debug());
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let (kind, detail) = match draining {
            true => ("host.draining", "accepts no new VMs"),
            false => ("host.ready", "accepts VMs again"),
        };
        change.event(kind, name, "", detail).await?;
        change.commit().await?;
        self.note_host_change();
        Ok(())
    }
}

/// A host that joins.
#[derive(Debug, Clone, Copy)]
pub struct Joining<'a> {
    /// The name of the host.
    pub host: &'a str,
    /// The address where its node listens.
    pub address: SocketAddr,
    /// The secret of its token.
    pub secret: &'a str,
    /// Its signing request.
    pub request: &'a str,
    /// The certificate that it gets.
    pub certificate: &'a str,
}

async fn enrol_again(mut change: Change<'_>, joining: &Joining<'_>) -> Result<String> {
    let row = sqlx::query(
        "SELECT certificate FROM join_tokens WHERE hash = $1 AND expires_ms >= $2 \
         AND host = $3 AND request_hash = $4",
    )
    .bind(hash(joining.secret))
    .bind(stored(now_ms()))
    .bind(joining.host)
    .bind(hash(joining.request))
    .fetch_optional(change.connection())
    .await
    .map_err(query_failed)?;
    let Some(row) = row else {
        let message = "the token is unknown, was already used, or has expired";
        return Err(Error::new(ErrorKind::Unauthenticated, message)
            .advise("create another one: army host token"));
    };
    // A host that was removed meanwhile is not found.
    set_address(&mut change, joining.host, joining.address).await?;
    change.commit().await?;
    text(&row, "certificate")
}

async fn set_address(change: &mut Change<'_>, name: &str, address: SocketAddr) -> Result<()> {
    let changed = sqlx::query("UPDATE hosts SET address = $1 WHERE name = $2")
        .bind(address.to_string())
        .bind(name)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
    match changed.rows_affected() {
        0 => {
            let message = format!("host `{}` not found", name.escape_debug());
            Err(Error::new(ErrorKind::NotFound, message))
        }
        _ => Ok(()),
    }
}

/// The columns of a host.
#[derive(Deserialize)]
struct Listed {
    name: String,
    labels: String,
    draining: i64,
    seen_ms: i64,
    capacity: String,
    address: Option<String>,
    owner: Option<String>,
    epoch: i64,
    reachable: i64,
    facts: String,
}

impl Listed {
    /// The record, where it can be read. One that cannot is logged.
    fn readable(self) -> Option<HostRow> {
        let name = self.name.clone();
        let read = self.read();
        read.inspect_err(|error| {
            tracing::error!(host = name, %error, "the record of a host cannot be read and is left out");
        })
        .ok()
    }

    fn read(self) -> Result<HostRow> {
        Ok(HostRow {
            labels: parse(&self.labels)?,
            draining: self.draining != 0,
            seen_ms: self.seen_ms.max(0).unsigned_abs(),
            capacity: parse(&self.capacity)?,
            address: self.address.and_then(|it| it.parse().ok()),
            owner: self.owner,
            epoch: self.epoch.max(0).unsigned_abs(),
            is_reachable: self.reachable != 0,
            facts: parse(&self.facts)?,
            name: self.name,
        })
    }
}
