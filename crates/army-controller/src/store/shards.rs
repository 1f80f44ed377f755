//! Which controller owns which host. The hosts of a cluster are shared out among its controllers.
//!
//! Each change of the owner gives the host a greater epoch, by which its node tells an old owner from
//! a new one. Epochs are times where time has moved on, so that a database that was replaced by an
//! older backup does not give out epochs that nodes have seen.

use super::{Change, Store, number, query_failed, unsigned};
use crate::{Error, ErrorKind, Result};
use army_api::hosts::Capacity;

/// The condition for a host to be nobody's.
macro_rules! unowned {
    () => {
        "address IS NOT NULL AND (owner IS NULL OR owner NOT IN (SELECT id FROM controllers))"
    };
}

impl Store {
    /// Renews the lease of this process, and ends the terms of controllers whose leases have run out.
    /// Where it `shares_hosts` with them, it takes hosts that nobody owns, and gives back those above
    /// its share. Returns whether the own hosts have changed.
    ///
    /// # Errors
    /// [`ErrorKind::Superseded`] where the own term has ended.
    pub(crate) async fn keep_term(&self, shares_hosts: bool) -> Result<bool> {
        let mut change = self.urgent_change().await?;
        self.renew_term(&mut change).await?;
        if !shares_hosts {
            change.commit().await?;
            return Ok(false);
        }
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM controllers) AS controllers, \
             (SELECT COUNT(*) FROM hosts WHERE address IS NOT NULL) AS hosts, \
             (SELECT COUNT(*) FROM hosts WHERE address IS NOT NULL AND owner = $1) AS own",
        )
        .bind(&self.term().id)
        .fetch_one(change.connection())
        .await
        .map_err(query_failed)?;
        let share = unsigned(&row, "hosts")?.div_ceil(unsigned(&row, "controllers")?.max(1));
        let (share, own) = (share as i64, number(&row, "own")?);
        let changed = if own > share {
            self.give_back(&mut change, own - share).await?
        } else {
            self.claim(&mut change, share - own).await?
        };
        change.commit().await?;
        if changed > 0 {
            self.note_host_change();
        }
        Ok(changed > 0)
    }

    /// Takes up to `count` hosts that nobody owns.
    async fn claim(&self, change: &mut Change<'_>, count: i64) -> Result<u64> {
        let now = change.clock().await?;
        let claimed = sqlx::query(concat!(
            "UPDATE hosts SET owner = $1, \
             epoch = CASE WHEN epoch >= $2 THEN epoch + 1 ELSE $2 END \
             WHERE name IN (SELECT name FROM hosts WHERE ",
            unowned!(),
            " ORDER BY name LIMIT $3)"
        ))
        .bind(&self.term().id)
        .bind(now)
        .bind(count)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        Ok(claimed.rows_affected())
    }

    /// Gives back `count` of the own hosts.
    async fn give_back(&self, change: &mut Change<'_>, count: i64) -> Result<u64> {
        let given = sqlx::query(
            "UPDATE hosts SET owner = NULL WHERE name IN (SELECT name FROM hosts \
             WHERE address IS NOT NULL AND owner = $1 ORDER BY name DESC LIMIT $2)",
        )
        .bind(&self.term().id)
        .bind(count)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        Ok(given.rows_affected())
    }

    /// Records hosts whose nodes are simulated, unless they are there.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) async fn join_hosts(&self, names: &[String]) -> Result<()> {
        let mut change = self.change().await?;
        for name in names {
            sqlx::query(
                "INSERT INTO hosts (name, labels, draining, seen_ms, capacity, address) \
                 VALUES ($1, '{}', 0, 0, $2, 'simulated') ON CONFLICT (name) DO NOTHING",
            )
            .bind(name)
            .bind(super::to_json(&Capacity::default())?)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        }
        change.commit().await?;
        self.note_host_change();
        Ok(())
    }

    /// Takes the host whose node is in this process, and returns its epoch. The host may be new.
    pub(crate) async fn claim_own_host(&self, name: &str) -> Result<u64> {
        let mut change = self.change().await?;
        let now = change.clock().await?;
        let row = sqlx::query(
            "INSERT INTO hosts (name, labels, draining, seen_ms, capacity, owner, epoch) \
             VALUES ($1, '{}', 0, 0, $2, $3, $4) ON CONFLICT (name) DO UPDATE SET epoch = CASE \
             WHEN hosts.owner = $3 THEN hosts.epoch \
             WHEN hosts.epoch >= $4 THEN hosts.epoch + 1 ELSE $4 END, owner = $3 RETURNING epoch",
        )
        .bind(name)
        .bind(super::to_json(&Capacity::default())?)
        .bind(&self.term().id)
        .bind(now)
        .fetch_one(change.connection())
        .await
        .map_err(query_failed)?;
        let epoch = unsigned(&row, "epoch")?;
        change.commit().await?;
        self.note_host_change();
        Ok(epoch)
    }

    /// The present epoch of a host, for a call to its node.
    ///
    /// # Errors
    /// [`ErrorKind::Superseded`] where the own term has ended, and [`ErrorKind::NotFound`].
    pub(crate) async fn host_epoch(&self, name: &str) -> Result<u64> {
        if !self.is_live(&self.term().id).await? {
            return Err(self.term_is_over());
        }
        let row = sqlx::query("SELECT epoch FROM hosts WHERE name = $1")
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        match row {
            Some(row) => unsigned(&row, "epoch"),
            None => {
                let message = format!("host `{}` not found", name.escape_debug());
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }
}
