//! Tenants: their quotas, and what their VMs have.

use army_api::tenants::{ChangeTenant, Quotas, Tenant, Used};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{Change, Store, number, query_failed, readable, stored, text, unsigned};
use crate::{Error, ErrorKind, Result};

/// What VMs count for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Nominal {
    /// The memory of the guest.
    pub(crate) memory_bytes: u64,
    /// The CPUs of the guest.
    pub(crate) vcpus: u32,
}

/// A query for tenants with what they have, which ends with a condition or an order.
macro_rules! tenants {
    ($end:literal) => {
        concat!(
            "SELECT name, max_vms, max_memory_bytes, max_vcpus, \
             (SELECT COUNT(*) FROM vms WHERE alive = 1 AND tenant = tenants.name) AS vms, \
             (SELECT CAST(COALESCE(SUM(memory_bytes), 0) AS BIGINT) FROM vms \
             WHERE alive = 1 AND tenant = tenants.name) AS memory_bytes, \
             (SELECT CAST(COALESCE(SUM(vcpus), 0) AS BIGINT) FROM vms \
             WHERE alive = 1 AND tenant = tenants.name) AS vcpus FROM tenants ",
            $end
        )
    };
}

impl Change<'_> {
    /// Checks that a tenant may have `count` more VMs. It is a part of the transaction that inserts
    /// them, so that no other request can take the same place.
    ///
    /// # Errors
    /// [`ErrorKind::QuotaExceeded`].
    pub(super) async fn check_quotas(
        &mut self,
        name: &str,
        count: u64,
        nominal: Nominal,
    ) -> Result<()> {
        // VMs are counted for those tenants only that have a quota.
        let row = sqlx::query(tenants!(
            "WHERE name = $1 AND (max_vms IS NOT NULL OR max_memory_bytes IS NOT NULL \
             OR max_vcpus IS NOT NULL)"
        ))
        .bind(name)
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        let Some(row) = row else {
            return Ok(());
        };
        let Tenant { quotas, used, .. } = tenant(&row)?;
        let memory = nominal.memory_bytes.saturating_mul(count);
        let vcpus = u64::from(nominal.vcpus).saturating_mul(count);
        for (what, has, adds, most) in [
            ("VMs", used.vms.into(), count, quotas.max_vms.map(u64::from)),
            (
                "bytes of memory",
                used.memory_bytes,
                memory,
                quotas.max_memory_bytes,
            ),
            (
                "CPUs",
                used.vcpus.into(),
                vcpus,
                quotas.max_vcpus.map(u64::from),
            ),
        ] {
            let Some(most) = most.filter(|most| has.saturating_add(adds) > *most) else {
                continue;
            };
            let message = format!(
                "the tenant {name} has {has} of the {most} {what} that it may have, and requested \
                 {adds}"
            );
            return Err(Error::new(ErrorKind::QuotaExceeded, message)
                .advise("destroy some VMs, or ask an administrator to raise the quota"));
        }
        Ok(())
    }
}

impl Store {
    /// All tenants, by name.
    pub(crate) async fn tenants(&self) -> Result<Vec<Tenant>> {
        let rows = sqlx::query(tenants!("ORDER BY name"))
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(readable(&rows, "tenants", tenant))
    }

    /// One tenant.
    pub(crate) async fn tenant(&self, name: &str) -> Result<Tenant> {
        let row = sqlx::query(tenants!("WHERE name = $1"))
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        row.as_ref().map_or_else(|| Err(unknown(name)), tenant)
    }

    /// Changes the quotas of a tenant.
    pub(crate) async fn change_tenant(&self, name: &str, request: &ChangeTenant) -> Result<()> {
        let mut change = self.change().await?;
        let mut changed = 0;
        for (statement, value) in [
            (
                "UPDATE tenants SET max_vms = $1 WHERE name = $2",
                request.max_vms.map(|most| most.map(u64::from)),
            ),
            (
                "UPDATE tenants SET max_memory_bytes = $1 WHERE name = $2",
                request.max_memory_bytes,
            ),
            (
                "UPDATE tenants SET max_vcpus = $1 WHERE name = $2",
                request.max_vcpus.map(|most| most.map(u64::from)),
            ),
        ] {
            let Some(value) = value else { continue };
            let done = sqlx::query(statement)
                .bind(value.map(stored))
                .bind(name)
                .execute(change.connection())
                .await
                .map_err(query_failed)?;
            if done.rows_affected() == 0 {
                return Err(unknown(name));
            }
            changed += 1;
        }
        if changed > 0 {
            let detail = "the quotas were changed";
            change.event("tenant.changed", name, name, detail).await?;
        }
        change.commit().await
    }

    /// What a VM counts for.
    pub(crate) async fn nominal(&self, vm: &str) -> Result<Nominal> {
        let row = sqlx::query("SELECT memory_bytes, vcpus FROM vms WHERE id = $1")
            .bind(vm)
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(Nominal {
            memory_bytes: unsigned(&row, "memory_bytes")?,
            vcpus: small(number(&row, "vcpus")?),
        })
    }
}

fn unknown(name: &str) -> Error {
    let message = format!("tenant `{}` not found", name.escape_debug());
    Error::new(ErrorKind::NotFound, message)
        .advise("a tenant exists as soon as a key names it: army key create")
}

fn tenant(row: &AnyRow) -> Result<Tenant> {
    let quota = |column: &str| -> Result<Option<u64>> {
        let value: Option<i64> = row.try_get(column).map_err(query_failed)?;
        Ok(value.map(|value| value.max(0).unsigned_abs()))
    };
    let count = |column: &str| Ok::<_, Error>(small(number(row, column)?));
    let limit = |value: Option<u64>| value.map(|it| u32::try_from(it).unwrap_or(u32::MAX));
    Ok(Tenant {
        name: text(row, "name")?,
        quotas: Quotas {
            max_vms: limit(quota("max_vms")?),
            max_memory_bytes: quota("max_memory_bytes")?,
            max_vcpus: limit(quota("max_vcpus")?),
        },
        used: Used {
            vms: count("vms")?,
            memory_bytes: unsigned(row, "memory_bytes")?,
            vcpus: count("vcpus")?,
        },
    })
}

fn small(number: i64) -> u32 {
    u32::try_from(number.max(0)).unwrap_or(u32::MAX)
}
