//! VMs that are created: their records, and the results of their creation.

use std::collections::BTreeMap;

use army_api::vms::{ForkTimes, Vm, VmState};

use super::leases::OwnTerm;
use super::operations::End;
use super::tenants::Nominal;
use super::vms::{next_change, vm};
use super::{Change, Store, is_taken, number, query_failed, readable, stored, text, to_json, word};
use crate::{Error, ErrorKind, Result};
use army_node_api::time::now_ms;

/// The first part of the template name of a VM that was forked from a running VM.
pub(crate) const LIVE_PREFIX: &str = "vm:";

/// VMs that are about to be created.
pub(crate) struct NewVms<'a> {
    /// The VMs to insert, all in state [`VmState::Creating`].
    pub(crate) vms: &'a [Vm],
    /// Their template, as hosts store it; `None` where that is the name in `vms`.
    pub(crate) template: Option<&'a str>,
    /// The variables that are added to the environment of their commands.
    pub(crate) environment: &'a BTreeMap<String, String>,
    /// The labels that their host must have.
    pub(crate) host_labels: &'a BTreeMap<String, String>,
    /// The id of the operation that creates them.
    pub(crate) operation: Option<&'a str>,
    /// What each of them counts for.
    pub(crate) nominal: Nominal,
}

/// What became of the creation of a VM.
pub(crate) type ForkResult = Result<Forked>;

/// A VM that was created and runs.
#[derive(Debug, Clone)]
pub(crate) struct Forked {
    /// How long it took.
    pub(crate) times: ForkTimes,
    /// What the host or the guest could not do for it.
    pub(crate) notices: Vec<String>,
    /// The addresses that the host has given it.
    pub(crate) addresses: Vec<String>,
}

impl Store {
    /// Records VMs that nobody creates.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) async fn insert_vms(&self, new: &NewVms<'_>) -> Result<()> {
        let mut change = self.change().await?;
        change.insert_vms(new).await?;
        change.commit().await
    }

    /// Records the results of the creation of VMs, by their ids, and the end of the operation that
    /// created them, where it has ended.
    pub(crate) async fn record_fork_results(
        &self,
        results: &[(&str, &ForkResult)],
        ended: Option<(&str, &End)>,
    ) -> Result<()> {
        let mut change = self.change().await?;
        for (id, result) in results {
            change.record_fork_result(id, result).await?;
        }
        if let Some((operation, end)) = ended {
            change.end_operation(operation, end).await?;
        }
        change.commit().await
    }

    /// The VMs that an operation creates, in the order of its request.
    pub(crate) async fn vms_of_operation(&self, operation: &str) -> Result<Vec<Vm>> {
        let rows = sqlx::query("SELECT * FROM vms WHERE operation = $1 ORDER BY number")
            .bind(operation)
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(readable(&rows, "vms", vm))
    }
}

impl Change<'_> {
    /// Records VMs that are about to be created, all or none of them.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where a name is taken, and [`ErrorKind::QuotaExceeded`].
    pub(super) async fn insert_vms(&mut self, new: &NewVms<'_>) -> Result<()> {
        let Some(first) = new.vms.first() else {
            return Ok(());
        };
        let template = new.template.unwrap_or(&first.template);
        if !template.starts_with(LIVE_PREFIX) && new.operation.is_some() {
            self.check_template_is_ready(template).await?;
        }
        let count = new.vms.len() as u64;
        self.check_quotas(&first.tenant, count, new.nominal).await?;
        let row = sqlx::query("SELECT COALESCE(MAX(number), 0) AS last FROM vms")
            .fetch_one(self.connection())
            .await
            .map_err(query_failed)?;
        let mut last = number(&row, "last")?;
        for vm in new.vms {
            last += 1;
            sqlx::query(concat!(
                "INSERT INTO vms (id, number, name, tenant, template, host, wanted, state, alive, \
                 labels, environment, created_ms, expires_ms, operation, network, creator, idle, \
                 memory_bytes, vcpus, template_name, disk_bytes, host_labels, changed) VALUES ($1, $2, $3, $4, $5, $6, 1, $7, 1, \
                 $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, ",
                next_change!(),
                ")"
            ))
            .bind(&vm.id)
            .bind(last)
            .bind(&vm.name)
            .bind(&vm.tenant)
            .bind(template)
            .bind(&vm.host)
            .bind(word(&vm.state)?)
            .bind(to_json(&vm.labels)?)
            .bind(to_json(new.environment)?)
            .bind(stored(vm.created_ms))
            .bind(vm.expires_ms.map(stored))
            .bind(new.operation)
            .bind(vm.network.as_ref().map(to_json).transpose()?)
            .bind(self.term.map(OwnTerm::id))
            .bind(vm.idle.as_ref().map(to_json).transpose()?)
            .bind(stored(new.nominal.memory_bytes))
            .bind(i64::from(new.nominal.vcpus))
            .bind((vm.template != template).then_some(&vm.template))
            .bind(stored(new.nominal.disk_bytes))
            .bind(to_json(new.host_labels)?)
            .execute(self.connection())
            .await
            .map_err(|error| match is_taken(&error) {
                true => {
                    let message = format!("a VM named `{}` already exists", vm.name);
                    Error::new(ErrorKind::Conflict, message)
                }
                false => query_failed(error),
            })?;
            let detail = format!("of {} on {}", vm.template, vm.host);
            self.event("vm.creating", &vm.id, &vm.tenant, &detail)
                .await?;
        }
        Ok(())
    }

    /// Records the result of a VM's creation: its times and notices, or its error.
    async fn record_fork_result(&mut self, id: &str, made: &ForkResult) -> Result<()> {
        let list = |texts: &Vec<String>| (!texts.is_empty()).then(|| to_json(texts)).transpose();
        let (state, reason) = match made {
            Ok(_) => (VmState::Running, None),
            Err(error) => (VmState::Failed, Some(error.message.clone())),
        };
        let (fork, notices, addresses) = match made {
            Ok(forked) => (
                Some(to_json(&forked.times)?),
                list(&forked.notices)?,
                list(&forked.addresses)?,
            ),
            Err(_) => (None, None, None),
        };
        // A VM that was destroyed in the meantime stays ended.
        let changed = sqlx::query(concat!(
            "UPDATE vms SET state = $1, alive = $2, reason = $3, fork = $4, notices = $5, \
             addresses = $8, \
             environment = CASE WHEN $2 = 1 THEN environment ELSE '{}' END, \
             ended_ms = CASE WHEN $2 = 1 THEN NULL ELSE $7 END, changed = ",
            next_change!(),
            " WHERE id = $6 AND alive = 1 RETURNING tenant"
        ))
        .bind(word(&state)?)
        .bind(i64::from(state.is_alive()))
        .bind(reason.as_deref())
        .bind(fork)
        .bind(notices)
        .bind(id)
        .bind(stored(now_ms()))
        .bind(addresses)
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        if let Some(row) = changed {
            let tenant = text(&row, "tenant")?;
            let kind = format!("vm.{}", word(&state)?);
            let detail = reason.unwrap_or_default();
            self.event(&kind, id, &tenant, &detail).await?;
        }
        Ok(())
    }
}
