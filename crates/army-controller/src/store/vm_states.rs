//! The states of VMs, as their hosts report them and as requests change them, and how long the
//! records of VMs that have ended are kept.
//!
//! Each change of a VM has a number, greater than those before. Whoever holds VMs in memory reads on
//! from the last number, and changes a VM on condition that it is as it was read.

use army_api::vms::{VmMemory, VmState};
use sqlx::any::AnyRow;

use super::tenants::{Nominal, small};
use super::vms::next_change;
use super::{
    Change, Store, from_word, number, optional_text, parse, query_failed, readable, stored, text,
    to_json, unsigned, word,
};
use crate::Result;
use army_node_api::time::now_ms;

/// The number of changes that are read at a time.
const PAGE: i64 = 1000;
/// The number of records that one transaction removes.
const PURGED: i64 = 500;

/// The change of a VM's state.
pub(crate) struct StateChange<'a> {
    /// The id of the VM.
    pub(crate) id: &'a str,
    /// The new state.
    pub(crate) state: VmState,
    /// Why it is in the new state; `None` where the host does not say.
    pub(crate) reason: Option<&'a str>,
    /// The number of the change after which the VM must not have changed; `None` where it may have.
    pub(crate) unless_changed_since: Option<i64>,
}

/// A VM, as a change of it is read.
#[derive(Debug, Clone)]
pub(crate) struct ChangedVm {
    /// The VM's id.
    pub(crate) id: String,
    /// The number of the change.
    pub(crate) number: i64,
    /// The VM's host.
    pub(crate) host: String,
    /// What the VM was forked from.
    pub(crate) template: String,
    /// The state that was last recorded.
    pub(crate) state: VmState,
    /// Whether the VM has not ended.
    pub(crate) alive: bool,
    /// Whether nobody has requested its deletion.
    pub(crate) wanted: bool,
    /// The controller that creates the VM, or created it.
    pub(crate) creator: Option<String>,
    /// The memory that was last recorded.
    pub(crate) memory: Option<VmMemory>,
    /// Whether the host has not applied all that was changed.
    pub(crate) pending: bool,
    /// The incarnation of the VM that may run.
    pub(crate) epoch: u64,
}

impl Store {
    /// Records states of VMs that have not ended. Returns the ids of those that were changed.
    pub(crate) async fn change_vm_states(
        &self,
        changes: &[StateChange<'_>],
    ) -> Result<Vec<String>> {
        let mut done = Vec::new();
        if changes.is_empty() {
            return Ok(done);
        }
        let mut change = self.change().await?;
        for wanted in changes {
            if change.change_vm_state(wanted).await? {
                done.push(wanted.id.to_owned());
            }
        }
        change.commit().await?;
        Ok(done)
    }

    /// Records a state of VMs that no host has reported: their host does not answer, does not have
    /// them, or has just changed them by a request.
    pub(crate) async fn set_vm_states(
        &self,
        ids: &[String],
        state: VmState,
        reason: &str,
    ) -> Result<()> {
        let changes = ids.iter().map(|id| StateChange {
            id,
            state,
            reason: Some(reason),
            unless_changed_since: None,
        });
        let changes: Vec<_> = changes.collect();
        self.change_vm_states(&changes).await.map(drop)
    }

    /// Records the measured memory of VMs, and their addresses, where there are any. That is no event.
    pub(crate) async fn record_memory(
        &self,
        measured: &[(String, VmMemory, Vec<String>)],
    ) -> Result<()> {
        if measured.is_empty() {
            return Ok(());
        }
        let mut change = self.change().await?;
        for (id, memory, addresses) in measured {
            let addresses = (!addresses.is_empty())
                .then(|| to_json(addresses))
                .transpose()?;
            sqlx::query(
                "UPDATE vms SET memory = $1, addresses = COALESCE($3, addresses) \
                 WHERE id = $2 AND alive = 1",
            )
            .bind(to_json(memory)?)
            .bind(id)
            .bind(addresses)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        }
        change.commit().await
    }

    /// Which of these VMs have ended by the database. One that the database does not have is left
    /// out, because it may be the wrong database.
    pub(crate) async fn ended_vms(&self, ids: &[String]) -> Result<Vec<String>> {
        let mut ended = Vec::new();
        for id in ids {
            let row = sqlx::query("SELECT id FROM vms WHERE id = $1 AND alive = 0")
                .bind(id)
                .fetch_optional(&self.pool)
                .await
                .map_err(query_failed)?;
            ended.extend(row.map(|_| id.clone()));
        }
        Ok(ended)
    }

    /// The number of the last change of a VM; 0 where there was none.
    pub(crate) async fn last_vm_change(&self) -> Result<i64> {
        let row = sqlx::query("SELECT COALESCE(MAX(changed), 0) AS last FROM vms")
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        number(&row, "last")
    }

    /// A page of the VMs that were changed after the change `last`, by the order of their changes.
    pub(crate) async fn vms_changed_after(&self, last: i64) -> Result<Vec<ChangedVm>> {
        let rows = sqlx::query(
            "SELECT id, changed, host, template, state, alive, wanted, creator, memory, epoch, \
             CASE WHEN applied < revision THEN 1 ELSE 0 END AS pending FROM vms \
             WHERE changed > $1 ORDER BY changed LIMIT $2",
        )
        .bind(last)
        .bind(PAGE)
        .fetch_all(&self.pool)
        .await
        .map_err(query_failed)?;
        Ok(readable(&rows, "vms", changed_vm))
    }

    /// The VMs of a host that have not ended.
    pub(crate) async fn vms_of_host(&self, host: &str) -> Result<Vec<ChangedVm>> {
        let rows = sqlx::query(
            "SELECT id, changed, host, template, state, alive, wanted, creator, memory, epoch, \
             CASE WHEN applied < revision THEN 1 ELSE 0 END AS pending FROM vms \
             WHERE host = $1 AND alive = 1",
        )
        .bind(host)
        .fetch_all(&self.pool)
        .await
        .map_err(query_failed)?;
        Ok(readable(&rows, "vms", changed_vm))
    }

    /// Removes some of the VMs that had ended by `before_ms`. Returns their number; where it is 0, no
    /// more are left.
    ///
    /// The newest VM, and the one that was changed last, remain: what follows them is numbered by
    /// them.
    pub(crate) async fn purge_ended(&self, before_ms: u64) -> Result<u64> {
        let mut change = self.change().await?;
        let purged = sqlx::query(
            "DELETE FROM vms WHERE id IN (SELECT id FROM vms WHERE alive = 0 AND ended_ms < $1 \
             AND changed < (SELECT MAX(changed) FROM vms) \
             AND number < (SELECT MAX(number) FROM vms) ORDER BY ended_ms LIMIT $2)",
        )
        .bind(stored(before_ms))
        .bind(PURGED)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await?;
        Ok(purged.rows_affected())
    }
}

impl Store {
    /// Records that a suspended VM runs again, which its host is about to be asked for, where the
    /// quotas of its tenant permit it. Does nothing for a VM in another state.
    ///
    /// # Errors
    /// [`ErrorKind::QuotaExceeded`](crate::ErrorKind::QuotaExceeded).
    pub(crate) async fn begin_resumption(&self, id: &str) -> Result<()> {
        let mut change = self.change().await?;
        let row = sqlx::query(
            "SELECT tenant, memory_bytes, vcpus FROM vms WHERE id = $1 AND state = 'suspended'",
        )
        .bind(id)
        .fetch_optional(change.connection())
        .await
        .map_err(query_failed)?;
        if let Some(row) = row {
            let nominal = Nominal {
                memory_bytes: unsigned(&row, "memory_bytes")?,
                vcpus: small(number(&row, "vcpus")?),
                ..Nominal::default()
            };
            let tenant = text(&row, "tenant")?;
            change.check_resumption_quotas(&tenant, nominal).await?;
            let resumed = StateChange {
                id,
                state: VmState::Running,
                reason: Some(""),
                unless_changed_since: None,
            };
            change.change_vm_state(&resumed).await?;
        }
        change.commit().await
    }
}

impl Change<'_> {
    /// Changes the state of a VM that has not ended, and returns whether that is a change. What a VM
    /// that has ended does not need any more is removed: its environment may have secrets.
    pub(super) async fn change_vm_state(&mut self, wanted: &StateChange<'_>) -> Result<bool> {
        let is_alive = wanted.state.is_alive();
        let state = word(&wanted.state)?;
        let changed = sqlx::query(concat!(
            "UPDATE vms SET state = $1, alive = $2, \
             reason = CASE WHEN $2 = 1 THEN $3 ELSE COALESCE($3, reason) END, \
             environment = CASE WHEN $2 = 1 THEN environment ELSE '{}' END, \
             ended_ms = CASE WHEN $2 = 1 THEN NULL ELSE $4 END, changed = ",
            next_change!(),
            " WHERE id = $5 AND alive = 1 AND state <> $1 AND changed <= $6 RETURNING tenant"
        ))
        .bind(&state)
        .bind(i64::from(is_alive))
        .bind(wanted.reason)
        .bind(stored(now_ms()))
        .bind(wanted.id)
        .bind(wanted.unless_changed_since.unwrap_or(i64::MAX))
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        let Some(row) = changed else {
            return Ok(false);
        };
        let tenant = text(&row, "tenant")?;
        let kind = format!("vm.{state}");
        let reason = wanted.reason.unwrap_or_default();
        self.event(&kind, wanted.id, &tenant, reason).await?;
        Ok(true)
    }
}

fn changed_vm(row: &AnyRow) -> Result<ChangedVm> {
    let memory = optional_text(row, "memory")?;
    Ok(ChangedVm {
        id: text(row, "id")?,
        number: number(row, "changed")?,
        host: text(row, "host")?,
        template: text(row, "template")?,
        state: from_word(&text(row, "state")?)?,
        alive: number(row, "alive")? != 0,
        wanted: number(row, "wanted")? != 0,
        creator: optional_text(row, "creator")?,
        memory: memory.as_deref().map(parse).transpose()?,
        pending: number(row, "pending")? != 0,
        epoch: unsigned(row, "epoch")?,
    })
}
