//! VMs that are moved to other hosts.
//!
//! A move has a row of its own only as an operation. The VM's row says where it is being moved to, and in
//! which epoch it runs there; the row changes its host once, with the end of the operation.

use std::collections::BTreeMap;

use army_api::vms::VmState;

use super::operations::End;
use super::vms::next_change;
use super::{
    Change, Store, json, number, optional_text, query_failed, stored, text, unsigned, word,
};
use crate::{Error, ErrorKind, Result};

/// A move that begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewMove<'a> {
    /// The VM's id.
    pub(crate) vm: &'a str,
    /// The host that has the VM.
    pub(crate) from: &'a str,
    /// The host that the VM is moved to.
    pub(crate) to: &'a str,
    /// The state that the VM has until then.
    pub(crate) state: VmState,
}

/// What is recorded of the move of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MoveRow {
    /// The host that has the VM.
    pub(crate) host: String,
    /// The host that the VM is being moved to; `None` where it is not being moved.
    pub(crate) destination: Option<String>,
    /// The epoch of the move, or the one that the VM runs in.
    pub(crate) epoch: u64,
    /// Whether the VM has not ended, and nobody has requested its deletion.
    pub(crate) wanted: bool,
    /// The number of the VM's last change.
    pub(crate) revision: u64,
    /// The labels that the VM's host must have.
    pub(crate) host_labels: BTreeMap<String, String>,
}

/// How a move ends for the VM's row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MoveEnd<'a> {
    /// The VM is on the other host.
    Moved,
    /// The VM stays where it was, for this reason, in a new epoch.
    Stayed(&'a str),
}

impl Store {
    /// What is recorded of the move of a VM.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub(crate) async fn move_of(&self, vm: &str) -> Result<MoveRow> {
        let row = sqlx::query(
            "SELECT host, destination, epoch, alive, wanted, revision, host_labels FROM vms \
             WHERE id = $1",
        )
        .bind(vm)
        .fetch_optional(&self.pool)
        .await
        .map_err(query_failed)?;
        let Some(row) = row else {
            let message = format!("VM `{}` not found", vm.escape_debug());
            return Err(Error::new(ErrorKind::NotFound, message));
        };
        Ok(MoveRow {
            host: text(&row, "host")?,
            destination: optional_text(&row, "destination")?,
            epoch: unsigned(&row, "epoch")?,
            wanted: number(&row, "alive")? != 0 && number(&row, "wanted")? != 0,
            revision: unsigned(&row, "revision")?,
            host_labels: json(&row, "host_labels")?,
        })
    }

    /// Chooses another destination for a VM that is being moved, in a greater epoch. The epoch before
    /// that one is the permission of its host to run it meanwhile. Returns false for a VM that was
    /// destroyed, or is not being moved any more.
    pub(crate) async fn redirect_move(&self, vm: &str, to: &str) -> Result<bool> {
        let mut change = self.change().await?;
        let redirected = sqlx::query(concat!(
            "UPDATE vms SET destination = $1, epoch = epoch + 2, changed = ",
            next_change!(),
            " WHERE id = $2 AND alive = 1 AND wanted = 1 AND destination IS NOT NULL"
        ))
        .bind(to)
        .bind(vm)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await?;
        Ok(redirected.rows_affected() > 0)
    }

    /// Records how the move of a VM to `to`, in `epoch`, has ended, with the VM's state then, and the end
    /// of its operation. A VM that has ended meanwhile stays as it is.
    pub(crate) async fn end_move(
        &self,
        vm: &str,
        (to, epoch): (&str, u64),
        end: MoveEnd<'_>,
        state: VmState,
        operation: (&str, &End),
    ) -> Result<()> {
        let mut change = self.change().await?;
        let query = match end {
            MoveEnd::Moved => concat!(
                "UPDATE vms SET host = destination, destination = NULL, state = $1, reason = '', \
                 applied = revision, changed = ",
                next_change!(),
                " WHERE id = $2 AND alive = 1 AND destination = $3 AND epoch = $4 RETURNING tenant"
            ),
            MoveEnd::Stayed(_) => concat!(
                "UPDATE vms SET epoch = epoch + 1, destination = NULL, state = $1, reason = '', \
                 changed = ",
                next_change!(),
                " WHERE id = $2 AND alive = 1 AND destination = $3 AND epoch = $4 RETURNING tenant"
            ),
        };
        let ended = sqlx::query(query)
            .bind(word(&state)?)
            .bind(vm)
            .bind(to)
            .bind(stored(epoch))
            .fetch_optional(change.connection())
            .await
            .map_err(query_failed)?;
        if let Some(row) = ended {
            let tenant = text(&row, "tenant")?;
            match end {
                MoveEnd::Moved => {
                    let detail = format!("to {to}");
                    change.event("vm.moved", vm, &tenant, &detail).await?;
                }
                MoveEnd::Stayed(reason) => {
                    let detail = format!("not to {to}: {reason}");
                    change.event("vm.stayed", vm, &tenant, &detail).await?;
                }
            }
        }
        let (operation, operation_end) = operation;
        change.end_operation(operation, operation_end).await?;
        change.commit().await
    }

    /// Which of these VMs, which `host` has in these epochs, are on another host in a later one.
    pub(crate) async fn vms_elsewhere(
        &self,
        host: &str,
        vms: &[(String, u64)],
    ) -> Result<Vec<String>> {
        let mut elsewhere = Vec::new();
        for (id, epoch) in vms {
            let row = sqlx::query(
                "SELECT id FROM vms WHERE id = $1 AND alive = 1 AND epoch > $2 AND host <> $3 \
                 AND (destination IS NULL OR destination <> $3)",
            )
            .bind(id)
            .bind(stored(*epoch))
            .bind(host)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
            elsewhere.extend(row.map(|_| id.clone()));
        }
        Ok(elsewhere)
    }
}

impl Change<'_> {
    /// Records that a VM is being moved.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the VM has changed since it was read.
    pub(super) async fn begin_move(&mut self, new: NewMove<'_>) -> Result<()> {
        let migrating = word(&VmState::Migrating)?;
        let begun = sqlx::query(concat!(
            "UPDATE vms SET state = $1, destination = $2, epoch = epoch + 1, changed = ",
            next_change!(),
            " WHERE id = $3 AND host = $4 AND state = $5 AND alive = 1 AND wanted = 1 \
             AND destination IS NULL RETURNING tenant"
        ))
        .bind(&migrating)
        .bind(new.to)
        .bind(new.vm)
        .bind(new.from)
        .bind(word(&new.state)?)
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        let Some(row) = begun else {
            let message = "the VM has changed meanwhile, or is being moved already";
            return Err(Error::new(ErrorKind::Conflict, message).advise("request it again"));
        };
        let tenant = text(&row, "tenant")?;
        let detail = format!("from {} to {}", new.from, new.to);
        self.event("vm.migrating", new.vm, &tenant, &detail).await
    }
}
