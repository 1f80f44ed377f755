//! VMs: what was requested, and what their hosts last reported.

use std::collections::{BTreeMap, HashSet};

use army_api::vms::{ForkTimes, Vm, VmFilter, VmMemory, VmPage, VmState};
use serde::Deserialize;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{
    Store, from_word, is_taken, json, number, optional_text, parse, query_failed, readable, stored,
    text, to_json, unsigned, word,
};
use crate::{Error, ErrorKind, Result};
use army_node_api::requests::VmReport;

/// The number of VMs of a page, where the client does not say.
const PAGE: u32 = 1000;

/// A page of VMs as one JSON text. A row of the driver for all databases takes some 20 us and a
/// switch of threads; as rows, 10,000 VMs take twice the time that their list may take.
///
/// The arguments are the database's names for the functions that make an object and an array.
macro_rules! page_query {
    ($object:literal, $array:literal) => {
        concat!(
            "SELECT CAST(COALESCE(",
            $array,
            "(",
            $object,
            "('number', number, 'vm', ",
            $object,
            "('id', id, 'name', name, 'tenant', tenant, 'template', template, 'host', host, \
             'state', state, 'reason', reason, 'labels', json(labels), 'created_ms', created_ms, \
             'expires_ms', CASE WHEN expires_ms < 0 THEN 9223372036854775807 ELSE expires_ms END, \
             'network', json(network), 'fork', json(fork), \
             'notices', json(COALESCE(notices, '[]')), 'memory', json(memory)))), '[]') \
             AS TEXT) AS page \
             FROM (SELECT * FROM vms WHERE number > $1 AND ($2 = '*' OR tenant = $2) \
             AND ($3 = 1 OR alive = 1) AND ($4 = '' OR template = $4) \
             AND ($5 = '' OR host = $5) ORDER BY number LIMIT $6) AS them"
        )
    };
}

/// A VM of a page. It is `None` where its record cannot be read.
#[derive(Deserialize)]
struct Listed {
    number: i64,
    vm: Option<Vm>,
}

/// The VMs of a page, as the database wrote it. A record that cannot be read is logged and left out.
fn listed(page: &str) -> Result<Vec<Listed>> {
    if let Ok(listed) = serde_json::from_str(page) {
        return Ok(listed);
    }
    // The slower way is taken only where a record is bad.
    let rows: Vec<serde_json::Value> = parse(page)?;
    let listed = rows.into_iter().map(|row| {
        let number = row["number"].as_i64().unwrap_or(0);
        let read = serde_json::from_value::<Listed>(row);
        read.unwrap_or_else(|error| {
            tracing::error!(number, %error, "the record of a VM cannot be read and is left out");
            Listed { number, vm: None }
        })
    });
    Ok(listed.collect())
}

/// VMs that are about to be created.
pub(crate) struct NewVms<'a> {
    /// The VMs to insert, all in state [`VmState::Creating`].
    pub(crate) vms: &'a [Vm],
    /// The variables that are added to the environment of their commands.
    pub(crate) environment: &'a BTreeMap<String, String>,
    /// The idempotency key of the request.
    pub(crate) request: Option<&'a str>,
}

/// The caller on whose behalf a VM is looked up.
#[derive(Clone, Copy)]
pub(crate) struct VmOwner<'a> {
    /// The caller's own tenant, in which names are looked up.
    pub(crate) own: &'a str,
    /// The only tenant whose VMs the caller may see; `None` for all.
    pub(crate) scope: Option<&'a str>,
}

/// A VM that has not ended, as reconciliation sees it.
pub(crate) struct PlacedVm {
    /// The VM's id.
    pub(crate) id: String,
    /// The state that was last recorded.
    pub(crate) state: VmState,
    /// Whether nobody has requested its deletion.
    pub(crate) wanted: bool,
}

impl Store {
    /// Records VMs that are about to be created, all or none of them.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where a name is taken, and [`ErrorKind::QuotaExceeded`].
    pub(crate) async fn insert_vms(&self, new: &NewVms<'_>) -> Result<()> {
        let Some(first) = new.vms.first() else {
            return Ok(());
        };
        let mut change = self.change().await?;
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM vms WHERE alive = 1 AND tenant = $1) AS used, \
             (SELECT COALESCE(MAX(number), 0) FROM vms) AS last, \
             (SELECT COALESCE(MAX(max_vms), -1) FROM tenants WHERE name = $1) AS quota",
        )
        .bind(&first.tenant)
        .fetch_one(change.connection())
        .await
        .map_err(query_failed)?;
        let (used, quota) = (number(&row, "used")?, number(&row, "quota")?);
        if quota >= 0 && used + new.vms.len() as i64 > quota {
            let message = format!(
                "the tenant {} has {used} of the {quota} VMs that it may have, and requested {}",
                first.tenant,
                new.vms.len()
            );
            return Err(Error::new(ErrorKind::QuotaExceeded, message)
                .advise("destroy some VMs, or ask an administrator to raise the quota"));
        }
        let mut last = number(&row, "last")?;
        for vm in new.vms {
            last += 1;
            sqlx::query(
                "INSERT INTO vms (id, number, name, tenant, template, host, wanted, state, alive, \
                 labels, environment, created_ms, expires_ms, request, network) \
                 VALUES ($1, $2, $3, $4, $5, $6, 1, $7, 1, $8, $9, $10, $11, $12, $13)",
            )
            .bind(&vm.id)
            .bind(last)
            .bind(&vm.name)
            .bind(&vm.tenant)
            .bind(&vm.template)
            .bind(&vm.host)
            .bind(word(&vm.state)?)
            .bind(to_json(&vm.labels)?)
            .bind(to_json(new.environment)?)
            .bind(stored(vm.created_ms))
            .bind(vm.expires_ms.map(stored))
            .bind(new.request)
            .bind(vm.network.as_ref().map(to_json).transpose()?)
            .execute(change.connection())
            .await
            .map_err(|error| match is_taken(&error) {
                true => {
                    let message = format!("a VM named `{}` already exists", vm.name);
                    Error::new(ErrorKind::Conflict, message)
                }
                false => query_failed(error),
            })?;
            let detail = format!("of {} on {}", vm.template, vm.host);
            change
                .event("vm.creating", &vm.id, &vm.tenant, &detail)
                .await?;
        }
        change.commit().await
    }

    /// Records the result of a VM's creation: its times and notices, or its error.
    pub(crate) async fn record_fork_result(
        &self,
        id: &str,
        made: &Result<(ForkTimes, Vec<String>)>,
    ) -> Result<()> {
        let mut change = self.change().await?;
        let (state, reason, fork, notices) = match made {
            Ok((times, notices)) => {
                let notices = (!notices.is_empty())
                    .then(|| to_json(notices))
                    .transpose()?;
                (VmState::Running, None, Some(to_json(times)?), notices)
            }
            Err(error) => (VmState::Failed, Some(error.message.clone()), None, None),
        };
        // A VM that was destroyed in the meantime stays ended.
        let changed = sqlx::query(
            "UPDATE vms SET state = $1, alive = $2, reason = $3, fork = $4, notices = $5 \
             WHERE id = $6 AND alive = 1 RETURNING tenant",
        )
        .bind(word(&state)?)
        .bind(i64::from(state.is_alive()))
        .bind(reason.as_deref())
        .bind(fork)
        .bind(notices)
        .bind(id)
        .fetch_optional(change.connection())
        .await
        .map_err(query_failed)?;
        if let Some(row) = changed {
            let tenant = text(&row, "tenant")?;
            let kind = format!("vm.{}", word(&state)?);
            let detail = reason.unwrap_or_default();
            change.event(&kind, id, &tenant, &detail).await?;
        }
        change.commit().await
    }

    /// Moves a VM to another host, because its own refused to create it. Returns false for a VM that
    /// was destroyed in the meantime, which is not moved.
    pub(crate) async fn move_vm(&self, id: &str, host: &str, reason: &str) -> Result<bool> {
        let mut change = self.change().await?;
        let moved = sqlx::query(
            "UPDATE vms SET host = $1 WHERE id = $2 AND alive = 1 AND wanted = 1 RETURNING tenant",
        )
        .bind(host)
        .bind(id)
        .fetch_optional(change.connection())
        .await
        .map_err(query_failed)?;
        if let Some(row) = &moved {
            let tenant = text(row, "tenant")?;
            let detail = format!("to {host}: {reason}");
            change.event("vm.moved", id, &tenant, &detail).await?;
        }
        change.commit().await?;
        Ok(moved.is_some())
    }

    /// Records what a host reports of its VMs. Returns the ids of those that have ended by the
    /// database, which the host may end and forget. A VM that the database does not have is left
    /// alone, because it may be the wrong database. VMs in `in_creation` are recorded by whoever
    /// creates them.
    pub(crate) async fn apply_node_report(
        &self,
        host: &str,
        reports: &[VmReport],
        in_creation: &HashSet<String>,
    ) -> Result<Vec<String>> {
        let query = "SELECT id, state, tenant, memory FROM vms WHERE host = $1 AND alive = 1";
        let rows = sqlx::query(query)
            .bind(host)
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        let known = readable(&rows, "vms", |row| {
            let state: VmState = from_word(&text(row, "state")?)?;
            let memory = optional_text(row, "memory")?;
            Ok((text(row, "id")?, (state, text(row, "tenant")?, memory)))
        });
        let known: BTreeMap<_, _> = known.into_iter().collect();
        let mut over = Vec::new();
        let mut change = self.change().await?;
        for report in reports {
            let Some((state, tenant, known_memory)) = known.get(&report.id) else {
                let row = sqlx::query("SELECT id FROM vms WHERE id = $1 AND alive = 0")
                    .bind(&report.id)
                    .fetch_optional(change.connection())
                    .await
                    .map_err(query_failed)?;
                over.extend(row.map(|_| report.id.clone()));
                continue;
            };
            // A VM that is being created is recorded as such, or has ended since.
            if report.state == VmState::Creating || in_creation.contains(&report.id) {
                continue;
            }
            let memory = report.memory.as_ref().map(to_json).transpose()?;
            if *state == report.state && memory == *known_memory {
                continue;
            }
            sqlx::query(
                "UPDATE vms SET state = $1, alive = $2, \
                 reason = CASE WHEN $2 = 1 THEN $3 ELSE COALESCE($3, reason) END, \
                 memory = COALESCE($4, memory) WHERE id = $5 AND alive = 1",
            )
            .bind(word(&report.state)?)
            .bind(i64::from(report.state.is_alive()))
            .bind(report.reason.as_deref())
            .bind(memory)
            .bind(&report.id)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
            if *state != report.state {
                let kind = format!("vm.{}", word(&report.state)?);
                let detail = report.reason.clone().unwrap_or_default();
                change.event(&kind, &report.id, tenant, &detail).await?;
            }
            if !report.state.is_alive() {
                over.push(report.id.clone());
            }
        }
        change.commit().await?;
        Ok(over)
    }

    /// Records a state of VMs that no host has reported: their host does not answer, does not have
    /// them, or has just changed them by a request.
    pub(crate) async fn set_vm_states(
        &self,
        ids: &[String],
        state: VmState,
        reason: &str,
    ) -> Result<()> {
        let mut change = self.change().await?;
        for id in ids {
            let changed = sqlx::query(
                "UPDATE vms SET state = $1, alive = $2, reason = $3 \
                 WHERE id = $4 AND alive = 1 AND state <> $1 RETURNING tenant",
            )
            .bind(word(&state)?)
            .bind(i64::from(state.is_alive()))
            .bind(reason)
            .bind(id)
            .fetch_optional(change.connection())
            .await
            .map_err(query_failed)?;
            if let Some(row) = changed {
                let tenant = text(&row, "tenant")?;
                let kind = format!("vm.{}", word(&state)?);
                change.event(&kind, id, &tenant, reason).await?;
            }
        }
        change.commit().await
    }

    /// Records that a VM is to be destroyed.
    pub(crate) async fn request_deletion(&self, id: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE vms SET wanted = 0 WHERE id = $1")
            .bind(id)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }

    /// The VMs of a host that have not ended.
    pub(crate) async fn vms_of_host(&self, host: &str) -> Result<Vec<PlacedVm>> {
        let rows = sqlx::query("SELECT id, state, wanted FROM vms WHERE host = $1 AND alive = 1")
            .bind(host)
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(readable(&rows, "vms", |row| {
            Ok(PlacedVm {
                id: text(row, "id")?,
                state: from_word(&text(row, "state")?)?,
                wanted: number(row, "wanted")? != 0,
            })
        }))
    }

    /// The VM with this id.
    pub(crate) async fn vm(&self, id: &str) -> Result<Vm> {
        let whose = VmOwner {
            own: "",
            scope: None,
        };
        self.find_vm(id, whose).await
    }

    /// The VM that a caller means by `key`: its id, the name of a VM of the caller's own tenant that
    /// has not ended, or `TENANT/NAME`. This is the one place where VMs are looked up for callers.
    ///
    /// A bare name never means another tenant's VM, whoever asks: tenants choose the names of their
    /// VMs, and one of them could catch what is meant for another.
    pub(crate) async fn find_vm(&self, key: &str, caller: VmOwner<'_>) -> Result<Vm> {
        let (tenant, name) = key.split_once('/').unwrap_or((caller.own, key));
        let row = sqlx::query(
            "SELECT * FROM vms WHERE (id = $1 OR (name = $2 AND tenant = $3 AND alive = 1)) \
             AND ($4 = '' OR tenant = $4) ORDER BY (id = $1) DESC, number DESC LIMIT 1",
        )
        .bind(key)
        .bind(name)
        .bind(tenant)
        .bind(caller.scope.unwrap_or_default())
        .fetch_optional(&self.pool)
        .await
        .map_err(query_failed)?;
        match row {
            Some(row) => vm(&row),
            None => {
                let message = format!("VM `{}` not found", key.escape_debug());
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }

    /// The variables that are added to the environment of a VM's commands.
    pub(crate) async fn environment(&self, id: &str) -> Result<BTreeMap<String, String>> {
        let row = sqlx::query("SELECT environment FROM vms WHERE id = $1")
            .bind(id)
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        json(&row, "environment")
    }

    /// The VMs of one request.
    pub(crate) async fn vms_of_request(&self, tenant: &str, request: &str) -> Result<Vec<Vm>> {
        let rows =
            sqlx::query("SELECT * FROM vms WHERE tenant = $1 AND request = $2 ORDER BY number")
                .bind(tenant)
                .bind(request)
                .fetch_all(&self.pool)
                .await
                .map_err(query_failed)?;
        Ok(readable(&rows, "vms", vm))
    }

    /// A page of VMs, of one tenant or of all.
    pub(crate) async fn vms(&self, filter: &VmFilter, tenant: Option<&str>) -> Result<VmPage> {
        let limit = filter.limit.unwrap_or(PAGE).clamp(1, 10_000);
        let after = match &filter.after {
            None => 0,
            Some(after) => {
                let number = after.parse::<i64>().ok().filter(|number| *number >= 0);
                number.ok_or_else(|| {
                    let message = "`after` must be the `next` of a page";
                    Error::new(ErrorKind::InvalidRequest, message)
                })?
            }
        };
        let label = match &filter.label {
            None => None,
            Some(label) => Some(label.split_once('=').ok_or_else(|| {
                let message = "a label must be written as key=value";
                Error::new(ErrorKind::InvalidRequest, message)
            })?),
        };
        let query = match self.is_postgres {
            true => page_query!("json_build_object", "json_agg"),
            false => page_query!("json_object", "json_group_array"),
        };
        let row = sqlx::query(query)
            .bind(after)
            .bind(tenant.unwrap_or("*"))
            .bind(i64::from(filter.all))
            .bind(filter.template.as_deref().unwrap_or_default())
            .bind(filter.host.as_deref().unwrap_or_default())
            // One VM more shows whether there is a next page.
            .bind(i64::from(limit) + 1)
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        let mut listed = listed(&text(&row, "page")?)?;
        let more = listed.len() > limit as usize;
        listed.truncate(limit as usize);
        let last = listed.last().filter(|_| more);
        let next = last.map(|last| last.number.to_string());
        let has_label = |vm: &Vm| {
            label.is_none_or(|(key, value)| vm.labels.get(key).is_some_and(|it| it == value))
        };
        let vms = listed.into_iter().filter_map(|listed| listed.vm);
        let vms = vms.filter(has_label).collect();
        Ok(VmPage { vms, next })
    }

    /// Spoils the record of a VM as no release does.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) async fn spoil_vm(&self, id: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE vms SET state = 'unheard of' WHERE id = $1")
            .bind(id)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }

    /// The number of VMs that have not ended, by template.
    pub(crate) async fn vms_by_template(&self) -> Result<BTreeMap<String, u32>> {
        self.count("template").await
    }

    /// The number of VMs that have not ended, by host.
    pub(crate) async fn vms_by_host(&self) -> Result<BTreeMap<String, u32>> {
        self.count("host").await
    }

    async fn count(&self, column: &'static str) -> Result<BTreeMap<String, u32>> {
        let query = match column {
            "host" => "SELECT host AS it, COUNT(*) AS n FROM vms WHERE alive = 1 GROUP BY host",
            _ => "SELECT template AS it, COUNT(*) AS n FROM vms WHERE alive = 1 GROUP BY template",
        };
        let rows = sqlx::query(query)
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        rows.iter()
            .map(|row| Ok((text(row, "it")?, number(row, "n")? as u32)))
            .collect()
    }
}

fn vm(row: &AnyRow) -> Result<Vm> {
    let optional = |column: &str| optional_text(row, column);
    let expires: Option<i64> = row.try_get("expires_ms").map_err(query_failed)?;
    let fork: Option<ForkTimes> = optional("fork")?.as_deref().map(parse).transpose()?;
    let memory: Option<VmMemory> = optional("memory")?.as_deref().map(parse).transpose()?;
    Ok(Vm {
        id: text(row, "id")?,
        name: text(row, "name")?,
        tenant: text(row, "tenant")?,
        template: text(row, "template")?,
        host: text(row, "host")?,
        state: from_word(&text(row, "state")?)?,
        reason: optional("reason")?,
        labels: json(row, "labels")?,
        created_ms: unsigned(row, "created_ms")?,
        // A former release stored times beyond the database's range as negative numbers.
        expires_ms: expires.map(|time| u64::try_from(time).unwrap_or(i64::MAX as u64)),
        network: optional("network")?.as_deref().map(parse).transpose()?,
        fork,
        notices: optional("notices")?
            .as_deref()
            .map(parse)
            .transpose()?
            .unwrap_or_default(),
        memory,
    })
}
