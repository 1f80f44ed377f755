//! Tenants: their quotas, and what their VMs have.

use army_api::tenants::{ChangeTenant, Quotas, Tenant, Used};
use army_api::vms::NetworkPolicy;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{
    Change, Store, number, optional_text, parse, query_failed, readable, stored, text, to_json,
    unsigned,
};
use crate::{Error, ErrorKind, Result};

/// What VMs count for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Nominal {
    /// The memory of the guest.
    pub(crate) memory_bytes: u64,
    /// The CPUs of the guest.
    pub(crate) vcpus: u32,
    /// The sizes of its writable disks, which it may grow to.
    pub(crate) disk_bytes: u64,
}

/// A query for tenants with what they have, which ends with a condition or an order.
macro_rules! tenants {
    ($end:literal) => {
        concat!(
            "SELECT name, max_vms, max_memory_bytes, max_vcpus, max_disk_bytes, max_templates, \
             max_standbys, network, \
             (SELECT COUNT(*) FROM vms WHERE alive = 1 AND tenant = tenants.name) AS vms, \
             (SELECT CAST(COALESCE(SUM(memory_bytes), 0) AS BIGINT) FROM vms \
             WHERE alive = 1 AND tenant = tenants.name AND state <> 'suspended') AS memory_bytes, \
             (SELECT CAST(COALESCE(SUM(vcpus), 0) AS BIGINT) FROM vms \
             WHERE alive = 1 AND tenant = tenants.name AND state <> 'suspended') AS vcpus, \
             (SELECT CAST(COALESCE(SUM(disk_bytes), 0) AS BIGINT) FROM vms \
             WHERE alive = 1 AND tenant = tenants.name) AS disk_bytes, \
             (SELECT COUNT(*) FROM templates WHERE tenant = tenants.name) AS templates, \
             (SELECT CAST(COALESCE(SUM(standbys), 0) AS BIGINT) FROM templates \
             WHERE tenant = tenants.name) AS standbys FROM tenants ",
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
        let at_most = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let added = Used {
            vms: at_most(count),
            memory_bytes: nominal.memory_bytes.saturating_mul(count),
            vcpus: at_most(u64::from(nominal.vcpus).saturating_mul(count)),
            disk_bytes: nominal.disk_bytes.saturating_mul(count),
            ..Used::default()
        };
        self.check_added(name, added).await
    }

    /// Checks that a suspended VM may use its memory and CPUs again, which it does not count for while it
    /// is suspended. It is a part of the transaction that records that it runs.
    ///
    /// # Errors
    /// [`ErrorKind::QuotaExceeded`].
    pub(super) async fn check_resumption_quotas(
        &mut self,
        name: &str,
        nominal: Nominal,
    ) -> Result<()> {
        let added = Used {
            memory_bytes: nominal.memory_bytes,
            vcpus: nominal.vcpus,
            ..Used::default()
        };
        self.check_added(name, added).await
    }

    async fn check_added(&mut self, name: &str, added: Used) -> Result<()> {
        // VMs are counted for those tenants only that have a quota.
        let row = sqlx::query(tenants!(
            "WHERE name = $1 AND (max_vms IS NOT NULL OR max_memory_bytes IS NOT NULL \
             OR max_vcpus IS NOT NULL OR max_disk_bytes IS NOT NULL)"
        ))
        .bind(name)
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        let Some(row) = row else {
            return Ok(());
        };
        let Tenant { quotas, used, .. } = tenant(&row)?;
        for (what, has, adds, most) in [
            (
                "VMs",
                used.vms.into(),
                added.vms.into(),
                quotas.max_vms.map(u64::from),
            ),
            (
                "bytes of memory",
                used.memory_bytes,
                added.memory_bytes,
                quotas.max_memory_bytes,
            ),
            (
                "CPUs",
                used.vcpus.into(),
                added.vcpus.into(),
                quotas.max_vcpus.map(u64::from),
            ),
            (
                "bytes of disk",
                used.disk_bytes,
                added.disk_bytes,
                quotas.max_disk_bytes,
            ),
        ] {
            let advice = "destroy some VMs, or ask an administrator to raise the quota";
            check_quota(name, what, (has, adds, most)).map_err(|it| it.advise(advice))?;
        }
        Ok(())
    }

    /// Checks that a tenant may make another template. It is a part of the transaction that records
    /// the operation that makes it, and counts that.
    ///
    /// # Errors
    /// [`ErrorKind::QuotaExceeded`].
    pub(super) async fn check_template_quota(&mut self, tenant: &str) -> Result<()> {
        let row = sqlx::query(
            "SELECT max_templates, (SELECT COUNT(*) FROM templates WHERE tenant = $1) \
             + (SELECT COUNT(*) FROM operations WHERE state = 'running' \
             AND substr(reserves, 1, length($1) + 1) = $1 || '/' AND NOT EXISTS (SELECT 1 \
             FROM templates WHERE tenant = $1 AND $1 || '/' || given_name = reserves)) AS templates \
             FROM tenants WHERE name = $1 AND max_templates IS NOT NULL",
        )
        .bind(tenant)
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        let Some(row) = row else {
            return Ok(());
        };
        let most = unsigned(&row, "max_templates")?;
        let others = unsigned(&row, "templates")?.saturating_sub(1);
        let checked = check_quota(tenant, "templates", (others, 1, Some(most)));
        checked.map_err(|it| {
            it.advise("remove some templates, or ask an administrator to raise the quota")
        })
    }

    /// Checks that a template may keep so many standbys, by the quota of the tenant that owns it.
    /// Fewer than it keeps are always allowed.
    ///
    /// # Errors
    /// [`ErrorKind::QuotaExceeded`].
    pub(super) async fn check_standby_quota(
        &mut self,
        template: &str,
        standbys: u32,
    ) -> Result<()> {
        let row = sqlx::query(
            "SELECT tenants.name AS tenant, max_standbys, standbys, (SELECT \
             CAST(COALESCE(SUM(others.standbys), 0) AS BIGINT) FROM templates AS others \
             WHERE others.tenant = tenants.name AND others.name <> templates.name) AS others \
             FROM templates JOIN tenants ON tenants.name = templates.tenant \
             WHERE templates.name = $1 AND max_standbys IS NOT NULL",
        )
        .bind(template)
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        let Some(row) = row.filter(|row| {
            let keeps = unsigned(row, "standbys").unwrap_or(0);
            keeps < u64::from(standbys)
        }) else {
            return Ok(());
        };
        let (tenant, others) = (text(&row, "tenant")?, unsigned(&row, "others")?);
        let most = Some(unsigned(&row, "max_standbys")?);
        let checked = check_quota(
            &tenant,
            "standbys on each host",
            (others, standbys.into(), most),
        );
        checked.map_err(|it| {
            it.advise("keep fewer standbys, or ask an administrator to raise the quota")
        })
    }

    async fn set_tenant_network(
        &mut self,
        name: &str,
        network: Option<&NetworkPolicy>,
    ) -> Result<()> {
        let done = sqlx::query("UPDATE tenants SET network = $1 WHERE name = $2")
            .bind(network.map(to_json).transpose()?)
            .bind(name)
            .execute(self.connection())
            .await
            .map_err(query_failed)?;
        if done.rows_affected() == 0 {
            return Err(unknown(name));
        }
        let detail = "the network policy was changed";
        self.event("tenant.changed", name, name, detail).await
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

    /// The network policy of a tenant, where it has one.
    pub(crate) async fn tenant_network(&self, name: &str) -> Result<Option<NetworkPolicy>> {
        let row = sqlx::query("SELECT network FROM tenants WHERE name = $1")
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        row.as_ref().map_or(Ok(None), network)
    }

    /// Whether a tenant has a quota of disk.
    pub(crate) async fn has_disk_quota(&self, name: &str) -> Result<bool> {
        let query = "SELECT name FROM tenants WHERE name = $1 AND max_disk_bytes IS NOT NULL";
        let row = sqlx::query(query)
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(row.is_some())
    }

    /// Changes the quotas and the network policy of a tenant.
    pub(crate) async fn change_tenant(&self, name: &str, request: &ChangeTenant) -> Result<()> {
        let mut change = self.change().await?;
        let count = |most: Option<Option<u32>>| most.map(|most| most.map(u64::from));
        let mut changed = 0;
        for (statement, value) in [
            (
                "UPDATE tenants SET max_vms = $1 WHERE name = $2",
                count(request.max_vms),
            ),
            (
                "UPDATE tenants SET max_memory_bytes = $1 WHERE name = $2",
                request.max_memory_bytes,
            ),
            (
                "UPDATE tenants SET max_vcpus = $1 WHERE name = $2",
                count(request.max_vcpus),
            ),
            (
                "UPDATE tenants SET max_disk_bytes = $1 WHERE name = $2",
                request.max_disk_bytes,
            ),
            (
                "UPDATE tenants SET max_templates = $1 WHERE name = $2",
                count(request.max_templates),
            ),
            (
                "UPDATE tenants SET max_standbys = $1 WHERE name = $2",
                count(request.max_standbys),
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
        if let Some(network) = &request.network {
            change.set_tenant_network(name, network.as_ref()).await?;
        }
        if changed > 0 {
            let detail = "the quotas were changed";
            change.event("tenant.changed", name, name, detail).await?;
        }
        change.commit().await
    }

    /// What a VM counts for.
    pub(crate) async fn nominal(&self, vm: &str) -> Result<Nominal> {
        let row = sqlx::query("SELECT memory_bytes, vcpus, disk_bytes FROM vms WHERE id = $1")
            .bind(vm)
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(Nominal {
            memory_bytes: unsigned(&row, "memory_bytes")?,
            vcpus: small(number(&row, "vcpus")?),
            disk_bytes: unsigned(&row, "disk_bytes")?,
        })
    }
}

/// Checks that a tenant may have more of something: of what it has, what is requested, and the most
/// that it may have.
fn check_quota(tenant: &str, what: &str, (has, adds, most): (u64, u64, Option<u64>)) -> Result<()> {
    // What a tenant has already is not refused after its quota was lowered.
    let Some(most) = most.filter(|most| adds > 0 && has.saturating_add(adds) > *most) else {
        return Ok(());
    };
    let message = format!(
        "the tenant {tenant} has {has} of the {most} {what} that it may have, and requested {adds}"
    );
    Err(Error::new(ErrorKind::QuotaExceeded, message))
}

fn unknown(name: &str) -> Error {
    let message = format!("tenant `{}` not found", name.escape_debug());
    Error::new(ErrorKind::NotFound, message)
        .advise("a tenant exists as soon as a key names it: army key create")
}

fn network(row: &AnyRow) -> Result<Option<NetworkPolicy>> {
    optional_text(row, "network")?
        .as_deref()
        .map(parse)
        .transpose()
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
            max_disk_bytes: quota("max_disk_bytes")?,
            max_templates: limit(quota("max_templates")?),
            max_standbys: limit(quota("max_standbys")?),
        },
        used: Used {
            vms: count("vms")?,
            memory_bytes: unsigned(row, "memory_bytes")?,
            vcpus: count("vcpus")?,
            disk_bytes: unsigned(row, "disk_bytes")?,
            templates: count("templates")?,
            standbys: count("standbys")?,
        },
        network: network(row)?,
    })
}

pub(super) fn small(number: i64) -> u32 {
    u32::try_from(number.max(0)).unwrap_or(u32::MAX)
}
