//! Hosts, as last heard of.

use std::collections::BTreeMap;

use army_api::hosts::Capacity;
use army_api::{Problem, ProblemKind};
use sqlx::any::AnyRow;

use super::{Result, Store, json, number, query_failed, text, to_json, unsigned};
use crate::node::supervise::now_ms;

/// A host, as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRow {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it takes no new VMs.
    pub draining: bool,
    /// When it was last heard of.
    pub seen_ms: u64,
    /// What it had then.
    pub capacity: Capacity,
}

impl Store {
    /// Notes that a host was heard of.
    pub async fn see_host(&self, name: &str, capacity: &Capacity) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query(
            "INSERT INTO hosts (name, labels, draining, seen_ms, capacity) \
             VALUES ($1, '{}', 0, $2, $3) \
             ON CONFLICT (name) DO UPDATE SET seen_ms = $2, capacity = $3",
        )
        .bind(name)
        .bind(now_ms() as i64)
        .bind(to_json(capacity)?)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await
    }

    /// All hosts, by name.
    pub async fn hosts(&self) -> Result<Vec<HostRow>> {
        let rows = sqlx::query("SELECT * FROM hosts ORDER BY name")
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        rows.iter().map(host).collect()
    }

    /// Whether a host takes new VMs.
    pub async fn drain_host(&self, name: &str, draining: bool) -> Result<()> {
        let mut change = self.change().await?;
        let changed = sqlx::query("UPDATE hosts SET draining = $1 WHERE name = $2")
            .bind(i64::from(draining))
            .bind(name)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if changed.rows_affected() == 0 {
            let detail = format!("there is no host `{}`", name.escape_debug());
            return Err(Problem::new(ProblemKind::NotFound, detail));
        }
        let (kind, detail) = match draining {
            true => ("host.draining", "takes no new VMs"),
            false => ("host.ready", "takes VMs again"),
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
    })
}
