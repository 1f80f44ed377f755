//! Who may write to the database: the terms of controllers.
//!
//! A controller begins a term when it opens the database, and renews the lease of it. A term ends
//! when its row is deleted: by its own controller, or by another one that finds that its lease has
//! run out. So a term that has ended never continues, and whoever finds no row may do what its
//! controller has left undone. Every transaction ends with a look at that row.
//!
//! With SQLite there is one controller, and its term ends all others.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{Change, Store, number, query_failed, stored, text};
use crate::{Error, ErrorKind, Result, random};
use army_node_api::time::now_ms;

/// How long a lease lasts that is not renewed.
pub(crate) const LEASE: Duration = Duration::from_secs(6);

/// The time of one controller as a writer of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Term {
    /// The id of the controller, which no other term has.
    pub(crate) id: String,
    /// Greater than the epoch of every earlier term.
    pub(crate) epoch: u64,
}

/// What a store knows of its own term.
#[derive(Clone)]
pub(super) struct OwnTerm {
    term: Term,
    /// Whether the term was found to have ended.
    ended: Arc<watch::Sender<bool>>,
}

impl OwnTerm {
    /// A term that has not begun yet.
    pub(super) fn new() -> Result<Self> {
        let term = Term {
            id: random::hex::<6>()?,
            epoch: 0,
        };
        Ok(Self {
            term,
            ended: Arc::new(watch::channel(false).0),
        })
    }

    /// The error that the term has ended, which is noted.
    pub(super) fn end(&self) -> Error {
        self.ended.send_replace(true);
        Error::new(
            ErrorKind::Superseded,
            "the term of this controller has ended: another one has taken over from it",
        )
    }

    pub(super) fn id(&self) -> &str {
        &self.term.id
    }
}

impl Store {
    /// The term of this process.
    pub(crate) fn term(&self) -> &Term {
        &self.term.term
    }

    /// Begins the term of this process. With SQLite it ends all others, and with PostgreSQL those
    /// whose leases have run out.
    pub(super) async fn begin_term(&mut self) -> Result<()> {
        let lease_over = match self.is_postgres {
            true => LEASE,
            // Whoever had the file open before has no lock on its directory any more.
            false => Duration::ZERO,
        };
        let mut change = self.change_before_term().await?;
        let now = change.clock().await?;
        let row = sqlx::query(
            "SELECT COALESCE(MAX(epoch), 0) AS epoch FROM (SELECT epoch FROM controllers \
             UNION ALL SELECT epoch FROM hosts) AS epochs",
        )
        .fetch_one(change.connection())
        .await
        .map_err(query_failed)?;
        // By the clock, an epoch is newer than those that nodes have seen from a database that was
        // replaced by an older backup.
        let epoch = (number(&row, "epoch")? + 1).max(now);
        sqlx::query("DELETE FROM controllers WHERE lease_ms < $1")
            .bind(match lease_over.is_zero() {
                true => i64::MAX,
                false => now,
            })
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        sqlx::query("INSERT INTO controllers (id, epoch, lease_ms) VALUES ($1, $2, $3)")
            .bind(self.term.id())
            .bind(epoch)
            .bind(now + LEASE.as_millis() as i64)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await?;
        self.term.term.epoch = epoch.max(0) as u64;
        Ok(())
    }

    /// Renews the lease of this process, and ends the terms of controllers whose leases have run
    /// out.
    ///
    /// # Errors
    /// [`ErrorKind::Superseded`] where the own term has ended.
    pub(super) async fn renew_term(&self, change: &mut Change<'_>) -> Result<()> {
        let now = change.clock().await?;
        let renewed = sqlx::query("UPDATE controllers SET lease_ms = $1 WHERE id = $2")
            .bind(now + LEASE.as_millis() as i64)
            .bind(self.term.id())
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if renewed.rows_affected() == 0 {
            return Err(self.term.end());
        }
        sqlx::query("DELETE FROM controllers WHERE lease_ms < $1")
            .bind(now)
            .execute(change.connection())
            .await
            .map(drop)
            .map_err(query_failed)
    }

    /// The error that the own term has ended, which is noted.
    pub(super) fn term_is_over(&self) -> Error {
        self.term.end()
    }

    /// Ends the term of this process, so that others take over at once.
    pub(crate) async fn end_term(&self) -> Result<()> {
        let mut change = self.change_before_term().await?;
        sqlx::query("DELETE FROM controllers WHERE id = $1")
            .bind(self.term.id())
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await?;
        self.term.end();
        Ok(())
    }

    /// Checks that all controllers of the database have the authority with this fingerprint. The
    /// first one decides.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where they have another one.
    pub(crate) async fn check_authority(&self, fingerprint: &str) -> Result<()> {
        if !self.is_postgres {
            // There are no others.
            return Ok(());
        }
        let mut change = self.change().await?;
        let row = sqlx::query(
            "INSERT INTO cluster_authority (one, fingerprint) VALUES (1, $1) \
             ON CONFLICT (one) DO UPDATE SET fingerprint = cluster_authority.fingerprint \
             RETURNING fingerprint",
        )
        .bind(fingerprint)
        .fetch_one(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await?;
        if text(&row, "fingerprint")? == fingerprint {
            return Ok(());
        }
        let message = "the controllers of this database have another certificate authority, and its \
             hosts would not trust this one";
        Err(Error::new(ErrorKind::Conflict, message).advise(
            "copy authority.key and authority.pem from the --state directory of one of them",
        ))
    }

    /// Returns when the term of this process was found to have ended.
    pub(crate) async fn term_ended(&self) {
        let mut ended = self.term.ended.subscribe();
        // The sender lives as long as the store does.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// The terms that have not ended, the oldest first.
    pub(crate) async fn live_controllers(&self) -> Result<Vec<Term>> {
        let rows = sqlx::query("SELECT id, epoch FROM controllers ORDER BY epoch")
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        let term = |row| {
            Ok(Term {
                id: text(row, "id")?,
                epoch: number(row, "epoch")?.max(0) as u64,
            })
        };
        rows.iter().map(term).collect()
    }

    /// Whether the term of the controller `id` has not ended. Until it has, no other
    /// controller resumes or undoes what that one has begun.
    pub(crate) async fn is_live(&self, id: &str) -> Result<bool> {
        let row = sqlx::query("SELECT id FROM controllers WHERE id = $1")
            .bind(id)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(row.is_some())
    }
}

impl Change<'_> {
    /// The time by the clock that all controllers of the database share, in milliseconds since 1970.
    pub(super) async fn clock(&mut self) -> Result<i64> {
        if !self.store.is_postgres {
            return Ok(stored(now_ms()));
        }
        let query = "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS now";
        let row = sqlx::query(query)
            .fetch_one(self.connection())
            .await
            .map_err(query_failed)?;
        number(&row, "now")
    }

    /// Checks that the term of the transaction's controller has not ended.
    pub(super) async fn check_term(&mut self) -> Result<()> {
        let Some(term) = self.term else {
            return Ok(());
        };
        let row = sqlx::query("SELECT id FROM controllers WHERE id = $1")
            .bind(term.id())
            .fetch_optional(self.connection())
            .await
            .map_err(query_failed)?;
        match row {
            Some(_) => Ok(()),
            None => Err(term.end()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Database;

    #[tokio::test]
    async fn a_term_that_was_superseded_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let url = Database::sqlite_url(&dir.path().join("army.db"));
        let first = Store::open(&url).await.unwrap();
        assert!(first.is_live(&first.term().id).await.unwrap());
        let second = Store::open(&url).await.unwrap();
        assert!(second.term().epoch > first.term().epoch);
        assert_eq!(
            second.live_controllers().await.unwrap(),
            [second.term().clone()]
        );
        let error = first.add_token("x", u64::MAX, None).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Superseded);
        let error = first.keep_term(true).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Superseded);
        first.term_ended().await;
        second.keep_term(true).await.unwrap();
        second.add_token("x", u64::MAX, None).await.unwrap();
        second.end_term().await.unwrap();
        assert!(!second.is_live(&second.term().id).await.unwrap());
    }
}
