//! Hosts, by their last reports, and the tokens with which hosts join.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use army_api::hosts::Capacity;
use sqlx::any::AnyRow;

use super::{
    Store, is_taken, json, number, optional_text, query_failed, readable, stored, text, to_json,
    unsigned,
};
use crate::store::keys::hash;
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
}

impl Store {
    /// Records the report of a host, which may be new.
    pub(crate) async fn upsert_host_report(&self, name: &str, capacity: &Capacity) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query(
            "INSERT INTO hosts (name, labels, draining, seen_ms, capacity) \
             VALUES ($1, '{}', 0, $2, $3) \
             ON CONFLICT (name) DO UPDATE SET seen_ms = $2, capacity = $3",
        )
        .bind(name)
        .bind(stored(now_ms()))
        .bind(to_json(capacity)?)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await
    }

    /// Adds a token with which a host may join until `expires_ms`.
    pub(crate) async fn add_token(&self, secret: &str, expires_ms: u64) -> Result<()> {
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
        change.commit().await
    }

    /// Adds a host that shows the secret of a token, and removes the token.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthenticated`] where the token is not valid, and [`ErrorKind::Conflict`] where
    /// a host has this name.
    pub(crate) async fn enrol_host(&self, name: &str, address: &str, secret: &str) -> Result<()> {
        let mut change = self.change().await?;
        let used = sqlx::query("DELETE FROM join_tokens WHERE hash = $1 AND expires_ms >= $2")
            .bind(hash(secret))
            .bind(stored(now_ms()))
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if used.rows_affected() == 0 {
            let message = "the token is unknown, was already used, or has expired";
            return Err(Error::new(ErrorKind::Unauthenticated, message)
                .advise("create another one: army host token"));
        }
        sqlx::query(
            "INSERT INTO hosts (name, labels, draining, seen_ms, capacity, address) \
             VALUES ($1, '{}', 0, 0, $2, $3)",
        )
        .bind(name)
        .bind(to_json(&Capacity::default())?)
        .bind(address)
        .execute(change.connection())
        .await
        .map_err(|error| match is_taken(&error) {
            true => {
                let message = format!("a host named `{name}` already exists");
                Error::new(ErrorKind::Conflict, message)
                    .advise("use another name, or remove that host: army host rm")
            }
            false => query_failed(error),
        })?;
        let detail = format!("joined, at {address}");
        change.event("host.joined", name, "", &detail).await?;
        change.commit().await
    }

    /// Removes a host and its copies of templates, and records its VMs as failed.
    pub(crate) async fn remove_host(&self, name: &str) -> Result<()> {
        let mut change = self.change().await?;
        for query in [
            "DELETE FROM hosts WHERE name = $1",
            "DELETE FROM template_copies WHERE host = $1",
            "UPDATE vms SET state = 'failed', alive = 0, reason = 'its host was removed' \
             WHERE host = $1 AND alive = 1",
        ] {
            sqlx::query(query)
                .bind(name)
                .execute(change.connection())
                .await
                .map_err(query_failed)?;
        }
        change.event("host.removed", name, "", "removed").await?;
        change.commit().await
    }

    /// Records an event of a host.
    pub(crate) async fn record_host_event(
        &self,
        kind: &str,
        name: &str,
        detail: &str,
    ) -> Result<()> {
        let mut change = self.change().await?;
        change.event(kind, name, "", detail).await?;
        change.commit().await
    }

    /// All hosts, by name.
    pub(crate) async fn hosts(&self) -> Result<Vec<HostRow>> {
        let rows = sqlx::query("SELECT * FROM hosts ORDER BY name")
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(readable(&rows, "hosts", host))
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
        change.commit().await
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
        change.commit().await
    }
}

fn host(row: &AnyRow) -> Result<HostRow> {
    Ok(HostRow {
        name: text(row, "name")?,
        labels: json(row, "labels")?,
        draining: number(row, "draining")? != 0,
        seen_ms: unsigned(row, "seen_ms")?,
        capacity: json(row, "capacity")?,
        address: optional_text(row, "address")?.and_then(|it| it.parse().ok()),
    })
}
