//! VMs: what was requested, and what their hosts last reported.

use std::collections::BTreeMap;

use army_api::vms::{ForkTimes, Vm, VmMemory};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{Store, from_word, json, number, optional_text, parse, query_failed, text, unsigned};
use crate::{Error, ErrorKind, Result};

/// The number of VMs of a template whose memory tells what others will have.
const MEASURED: i64 = 100;

/// The number of the next change of a VM.
macro_rules! next_change {
    () => {
        "(SELECT COALESCE(MAX(changed), 0) + 1 FROM vms)"
    };
}
pub(super) use next_change;

/// The caller on whose behalf a VM is looked up.
#[derive(Clone, Copy)]
pub(crate) struct VmOwner<'a> {
    /// The caller's own tenant, in which names are looked up.
    pub(crate) own: &'a str,
    /// The only tenant whose VMs the caller may see; `None` for all.
    pub(crate) scope: Option<&'a str>,
}

impl Store {
    /// Moves a VM to another host, because its own refused to create it. Returns false for a VM that
    /// was destroyed in the meantime, which is not moved.
    pub(crate) async fn move_vm(&self, id: &str, host: &str, reason: &str) -> Result<bool> {
        let mut change = self.change().await?;
        let moved = sqlx::query(concat!(
            "UPDATE vms SET host = $1, changed = ",
            next_change!(),
            " WHERE id = $2 AND alive = 1 AND wanted = 1 RETURNING tenant"
        ))
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

    /// Records that a VM is to be destroyed.
    pub(crate) async fn request_deletion(&self, id: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query(concat!(
            "UPDATE vms SET wanted = 0, changed = ",
            next_change!(),
            " WHERE id = $1 AND wanted = 1"
        ))
        .bind(id)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await
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

    /// The number of VMs on a host that have not ended.
    pub(crate) async fn count_vms_of_host(&self, host: &str) -> Result<u32> {
        let row = sqlx::query("SELECT COUNT(*) AS n FROM vms WHERE host = $1 AND alive = 1")
            .bind(host)
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(number(&row, "n")? as u32)
    }

    /// The private memory of some VMs of a template that have not ended, in bytes, as it was last
    /// recorded.
    pub(crate) async fn measured_memory(&self, template: &str) -> Result<Vec<u64>> {
        // As one text, because rows are slow: each request for VMs asks.
        let query = match self.is_postgres {
            true => {
                "SELECT CAST(COALESCE(json_agg(memory), '[]') AS TEXT) AS memory FROM (SELECT memory \
                 FROM vms WHERE template = $1 AND alive = 1 ORDER BY number LIMIT $2) AS them"
            }
            false => {
                "SELECT CAST(json_group_array(memory) AS TEXT) AS memory FROM (SELECT memory \
                 FROM vms WHERE template = $1 AND alive = 1 ORDER BY number LIMIT $2) AS them"
            }
        };
        let row = sqlx::query(query)
            .bind(template)
            .bind(MEASURED)
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        let recorded: Vec<Option<String>> = json(&row, "memory")?;
        let measured = recorded.iter().flatten();
        let measured = measured.map(|memory| Ok(parse::<VmMemory>(memory)?.private_bytes));
        measured.collect()
    }

    async fn count(&self, column: &'static str) -> Result<BTreeMap<String, u32>> {
        let query = match (column, self.is_postgres) {
            ("host", true) => {
                "SELECT CAST(COALESCE(json_object_agg(it, n), '{}') AS TEXT) AS counts FROM (SELECT \
                 host AS it, COUNT(*) AS n FROM vms WHERE alive = 1 GROUP BY host) AS them"
            }
            ("host", false) => {
                "SELECT CAST(json_group_object(it, n) AS TEXT) AS counts FROM (SELECT \
                 host AS it, COUNT(*) AS n FROM vms WHERE alive = 1 GROUP BY host) AS them"
            }
            (_, true) => {
                "SELECT CAST(COALESCE(json_object_agg(it, n), '{}') AS TEXT) AS counts FROM (SELECT \
                 template AS it, COUNT(*) AS n FROM vms WHERE alive = 1 GROUP BY template) AS them"
            }
            (_, false) => {
                "SELECT CAST(json_group_object(it, n) AS TEXT) AS counts FROM (SELECT \
                 template AS it, COUNT(*) AS n FROM vms WHERE alive = 1 GROUP BY template) AS them"
            }
        };
        let row = sqlx::query(query)
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        json(&row, "counts")
    }
}

pub(super) fn vm(row: &AnyRow) -> Result<Vm> {
    let optional = |column: &str| optional_text(row, column);
    let expires: Option<i64> = row.try_get("expires_ms").map_err(query_failed)?;
    let fork: Option<ForkTimes> = optional("fork")?.as_deref().map(parse).transpose()?;
    let memory: Option<VmMemory> = optional("memory")?.as_deref().map(parse).transpose()?;
    Ok(Vm {
        id: text(row, "id")?,
        name: text(row, "name")?,
        tenant: text(row, "tenant")?,
        template: match optional("template_name")? {
            Some(name) => name,
            None => text(row, "template")?,
        },
        host: text(row, "host")?,
        state: from_word(&text(row, "state")?)?,
        reason: optional("reason")?,
        labels: json(row, "labels")?,
        created_ms: unsigned(row, "created_ms")?,
        // A former release stored times beyond the database's range as negative numbers.
        expires_ms: expires.map(|time| u64::try_from(time).unwrap_or(i64::MAX as u64)),
        network: optional("network")?.as_deref().map(parse).transpose()?,
        idle: optional("idle")?.as_deref().map(parse).transpose()?,
        fork,
        addresses: optional("addresses")?
            .as_deref()
            .map(parse)
            .transpose()?
            .unwrap_or_default(),
        notices: optional("notices")?
            .as_deref()
            .map(parse)
            .transpose()?
            .unwrap_or_default(),
        memory,
    })
}
