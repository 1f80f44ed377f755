//! Filling the database with the records of a large fleet, for measurements and tests.

use super::{Store, query_failed};
use crate::Result;

/// The VMs of one statement.
const BATCH: u32 = 50_000;

impl Store {
    /// Lets the lease of this process be over.
    pub(crate) async fn expire_lease(&self) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE controllers SET lease_ms = 0 WHERE id = $1")
            .bind(&self.term().id)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }

    /// Lets the leases of all controllers be over.
    #[cfg(test)]
    pub(crate) async fn expire_all_leases(&self) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE controllers SET lease_ms = 0")
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }

    /// The number of records of VMs, whether they have ended or not.
    #[cfg(test)]
    pub(crate) async fn vms_ever(&self) -> Result<i64> {
        let row = sqlx::query("SELECT COUNT(*) AS n FROM vms")
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        super::number(&row, "n")
    }

    /// Inserts VMs of a large fleet: `alive` that run on `hosts` hosts, and `ended` that have ended.
    pub(crate) async fn fill(&self, hosts: u32, alive: u32, ended: u32) -> Result<()> {
        let total = u64::from(alive) + u64::from(ended);
        let mut first = 1_u64;
        // Those that ended are older.
        while first <= total {
            let last = (first + u64::from(BATCH) - 1).min(total);
            let mut change = self.change().await?;
            // A number below that of `alive` is a VM that has ended.
            sqlx::query(
                "WITH RECURSIVE numbers(n) AS (SELECT CAST($1 AS BIGINT) UNION ALL \
                 SELECT n + 1 FROM numbers WHERE n < $2) \
                 INSERT INTO vms (id, number, name, tenant, template, host, wanted, state, alive, \
                 reason, labels, environment, created_ms, ended_ms, changed, fork, memory) \
                 SELECT CASE WHEN n <= $3 THEN 'ended-' || n ELSE 'fleet-' || (n - $3) END, n, \
                 'worker-' || n, 'tenant-' || (n % 50), 'template-' || (n % 20), \
                 'host-' || (CASE WHEN n <= $3 THEN n ELSE n - $3 END % $4), \
                 CASE WHEN n <= $3 THEN 0 ELSE 1 END, \
                 CASE WHEN n <= $3 THEN 'ended' ELSE 'running' END, \
                 CASE WHEN n <= $3 THEN 0 ELSE 1 END, \
                 CASE WHEN n <= $3 THEN 'destroyed' ELSE NULL END, \
                 '{\"team\":\"blue\"}', '{}', $5 + n, \
                 CASE WHEN n <= $3 THEN $5 + n ELSE NULL END, n, \
                 '{\"warm\":true,\"placement_us\":1,\"running_us\":1,\"identity_us\":1,\"total_us\":3}', \
                 '{\"guest_bytes\":268435456,\"private_bytes\":5242880,\"shared_bytes\":41943040,\"swapped_bytes\":0}' \
                 FROM numbers",
            )
            .bind(first as i64)
            .bind(last as i64)
            .bind(i64::from(ended))
            .bind(i64::from(hosts))
            // Recent enough not to be purged while it is measured.
            .bind(army_node_api::time::now_ms() as i64 - 24 * 3600 * 1000)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
            change.commit().await?;
            first = last + 1;
        }
        let mut change = self.change().await?;
        sqlx::query("ANALYZE")
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }
}
