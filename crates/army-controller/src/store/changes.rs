//! Changes of VMs: what was requested, and whether the VM's host has applied it.
//!
//! Each change of what a host enforces has a number that grows. A host ignores a change that is older
//! than its last one, so changes may overtake each other and may be sent again.

use std::collections::BTreeMap;

use army_api::vms::{IdlePolicy, NetworkPolicy, VmState};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::vms::next_change;
use super::{
    Store, from_word, json, number, optional_text, parse, query_failed, readable, stored, text,
    to_json,
};
use crate::{Error, ErrorKind, Result};

/// The most changes that are sent to a host again at a time.
const PAGE: i64 = 100;

/// What a host enforces for a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Enforced {
    /// When the VM is destroyed, in milliseconds since 1970.
    pub(crate) expires_ms: Option<u64>,
    /// What happens when the VM is not used.
    pub(crate) idle: Option<IdlePolicy>,
    /// What the VM's network permits.
    pub(crate) network: Option<NetworkPolicy>,
}

/// A change that a host may not have applied.
#[derive(Debug, Clone)]
pub(crate) struct RequestedChange {
    /// The VM's id.
    pub(crate) vm: String,
    /// The number of the change.
    pub(crate) revision: u64,
    /// What the host is to enforce.
    pub(crate) enforced: Enforced,
}

/// The labels and the limits of a VM.
pub(crate) type Details = (BTreeMap<String, String>, Enforced);

impl Store {
    /// Changes a VM that runs. `change` gets what is recorded, and returns what is to be. Returns the
    /// former limits and the change for the host, where the limits differ.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the VM has ended, is to be destroyed, or is being created, and
    /// the errors of `change`.
    pub(crate) async fn change_vm(
        &self,
        id: &str,
        detail: &str,
        change_details: impl FnOnce(Details) -> Result<Details>,
    ) -> Result<Option<(Enforced, RequestedChange)>> {
        let mut change = self.change().await?;
        // This locks the row before it is read, where there are several writers.
        let row = sqlx::query(concat!(
            "UPDATE vms SET revision = revision + 1, changed = ",
            next_change!(),
            " WHERE id = $1 RETURNING name, tenant, state, \
             wanted, reason, labels, expires_ms, idle, network, revision, applied"
        ))
        .bind(id)
        .fetch_one(change.connection())
        .await
        .map_err(query_failed)?;
        check_changeable(&row)?;
        let former = enforced(&row)?;
        let (labels, wanted) = change_details((json(&row, "labels")?, former.clone()))?;
        let revision = number(&row, "revision")?;
        // A host that has applied all has this one, too, where it is not concerned.
        let applied = match former == wanted && number(&row, "applied")? == revision - 1 {
            true => revision,
            false => number(&row, "applied")?,
        };
        sqlx::query(concat!(
            "UPDATE vms SET labels = $1, expires_ms = $2, idle = $3, network = $4, applied = $5, \
             changed = ",
            next_change!(),
            " WHERE id = $6"
        ))
        .bind(to_json(&labels)?)
        .bind(wanted.expires_ms.map(stored))
        .bind(wanted.idle.as_ref().map(to_json).transpose()?)
        .bind(wanted.network.as_ref().map(to_json).transpose()?)
        .bind(applied)
        .bind(id)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        let tenant = text(&row, "tenant")?;
        change.event("vm.changed", id, &tenant, detail).await?;
        change.commit().await?;
        Ok((applied != revision).then(|| {
            let change = RequestedChange {
                vm: id.to_owned(),
                revision: revision.unsigned_abs(),
                enforced: wanted,
            };
            (former, change)
        }))
    }

    /// Records that a host has applied a change of a VM, and all former ones.
    pub(crate) async fn record_applied(&self, vm: &str, revision: u64) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query(concat!(
            "UPDATE vms SET applied = $1, changed = ",
            next_change!(),
            " WHERE id = $2 AND applied < $1"
        ))
        .bind(stored(revision))
        .bind(vm)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await
    }

    /// Takes back a change that a host has refused, unless the VM was changed again.
    pub(crate) async fn revert_change(
        &self,
        refused: &RequestedChange,
        former: &Enforced,
    ) -> Result<()> {
        let mut change = self.change().await?;
        let row = sqlx::query(concat!(
            "UPDATE vms SET expires_ms = $1, idle = $2, network = $3, applied = revision, \
             changed = ",
            next_change!(),
            " WHERE id = $4 AND revision = $5 RETURNING tenant"
        ))
        .bind(former.expires_ms.map(stored))
        .bind(former.idle.as_ref().map(to_json).transpose()?)
        .bind(former.network.as_ref().map(to_json).transpose()?)
        .bind(&refused.vm)
        .bind(stored(refused.revision))
        .fetch_optional(change.connection())
        .await
        .map_err(query_failed)?;
        if let Some(row) = row {
            let tenant = text(&row, "tenant")?;
            let detail = "the host refused the last change";
            change
                .event("vm.changed", &refused.vm, &tenant, detail)
                .await?;
        }
        change.commit().await
    }

    /// Changes of a host's VMs that the host has not applied.
    pub(crate) async fn unapplied_changes(&self, host: &str) -> Result<Vec<RequestedChange>> {
        let rows = sqlx::query(
            "SELECT id, revision, expires_ms, idle, network FROM vms \
             WHERE host = $1 AND applied < revision AND alive = 1 ORDER BY number LIMIT $2",
        )
        .bind(host)
        .bind(PAGE)
        .fetch_all(&self.pool)
        .await
        .map_err(query_failed)?;
        Ok(readable(&rows, "vms", |row| {
            Ok(RequestedChange {
                vm: text(row, "id")?,
                revision: number(row, "revision")?.unsigned_abs(),
                enforced: enforced(row)?,
            })
        }))
    }
}

fn check_changeable(row: &AnyRow) -> Result<()> {
    let name = text(row, "name")?;
    let state: VmState = from_word(&text(row, "state")?)?;
    let message = if !state.is_alive() {
        let reason = optional_text(row, "reason")?;
        let reason = reason.as_deref().unwrap_or("the reason is unknown");
        format!("the VM {name} has ended: {reason}")
    } else if number(row, "wanted")? == 0 {
        format!("the VM {name} is being destroyed")
    } else if state == VmState::Migrating {
        format!("the VM {name} is being moved to another host: it can be changed when it is there")
    } else if state == VmState::Creating {
        format!("the VM {name} is being created: it can be changed when it runs")
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Conflict, message))
}

fn enforced(row: &AnyRow) -> Result<Enforced> {
    let expires: Option<i64> = row.try_get("expires_ms").map_err(query_failed)?;
    let optional = |column: &str| optional_text(row, column);
    Ok(Enforced {
        expires_ms: expires.map(|time| u64::try_from(time).unwrap_or(i64::MAX as u64)),
        idle: optional("idle")?.as_deref().map(parse).transpose()?,
        network: optional("network")?.as_deref().map(parse).transpose()?,
    })
}
