//! Transactions that change the database.
//!
//! Each is a [`Change`]. Changes are made one after the other: in the database, writers would have to try
//! again instead of waiting. A commit waits for the disk, so changes that follow each other closely share
//! one. They are savepoints of one transaction of the database, which is their [`Batch`]. A batch is
//! committed by a task that queues for its turn when the first change is complete, behind the changes
//! that wait already. So a change that is alone waits for nothing, and while one batch is committed,
//! those who want to change something gather for the next one.
//!
//! A change has succeeded when its batch is committed. Until then nobody sees it but the changes that
//! follow it in its batch, which fail with it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use army_api::events::Event;
use sqlx::pool::PoolConnection;
use sqlx::{AnyConnection, AssertSqlSafe};
use tokio::sync::{Mutex, MutexGuard, watch};

use super::leases::OwnTerm;
use super::{Store, failed};
use crate::{Error, ErrorKind, Result};

/// Begins a transaction of PostgreSQL. Writers wait for each other there, too, whichever controller
/// they belong to, so that numbers grow in the order in which transactions are committed.
const POSTGRES_BEGIN: &str = "BEGIN; SELECT 1 FROM pg_advisory_xact_lock(1095912793)";
/// Commits a transaction of PostgreSQL, and tells all controllers.
const POSTGRES_COMMIT: &str = "NOTIFY army; COMMIT";
/// The most changes that share one commit.
const MOST: u32 = 64;
/// How long a batch lets changes begin. The first one waits for the last one, and so do other
/// controllers.
const OPEN: Duration = Duration::from_millis(100);

/// Where changes queue: held by whoever makes one, with what was made and is not committed yet.
pub(super) type Turn = Arc<Mutex<Option<Batch>>>;

/// Changes that are committed together.
///
/// The connection of a transaction that is not committed is closed. Where SQLite cannot write, it may
/// end a transaction by itself, or leave it open after a `COMMIT` or `ROLLBACK`. The driver's own
/// transactions lose count then, and later reads on their connection are old and writes fail.
pub(super) struct Batch {
    connection: PoolConnection<sqlx::Any>,
    begun: Instant,
    /// The number of changes that have begun after the first one. Each has a savepoint of this number.
    savepoints: u32,
    /// The number of changes that are complete.
    complete: u32,
    /// The savepoint of a change that was given up, whose statements are to be undone.
    undo: Option<u32>,
    /// The events of the complete changes.
    events: Vec<Event>,
    /// What becomes of the complete changes.
    outcome: watch::Sender<Option<Result<()>>>,
}

/// A transaction, and the events that describe it. It is rolled back unless it is committed.
pub(super) struct Change<'a> {
    /// The batch of the change, which is there until the change ends.
    batch: MutexGuard<'a, Option<Batch>>,
    queue: &'a Turn,
    /// The number of the change's savepoint; `None` for the first one of a batch.
    savepoint: Option<u32>,
    /// The term that must last until the transaction is committed; `None` where none is needed.
    pub(super) term: Option<&'a OwnTerm>,
    is_complete: bool,
    pub(super) events: Vec<Event>,
    pub(super) store: &'a Store,
}

impl Store {
    /// Begins a transaction, which can be committed while the term of this process lasts.
    pub(super) async fn change(&self) -> Result<Change<'_>> {
        let mut change = self.change_before_term().await?;
        change.term = Some(&self.term);
        Ok(change)
    }

    /// Begins a transaction that waits for those of other controllers only, and not for those that wait
    /// in this process: however many these are, the term of this process is renewed in time.
    pub(super) async fn urgent_change(&self) -> Result<Change<'_>> {
        let mut change = self.change_in(&self.urgent).await?;
        change.term = Some(&self.term);
        Ok(change)
    }

    /// Begins a transaction that does not depend on the term of this process.
    pub(super) async fn change_before_term(&self) -> Result<Change<'_>> {
        self.change_in(&self.turn).await
    }

    async fn change_in<'a>(&'a self, queue: &'a Turn) -> Result<Change<'a>> {
        loop {
            let mut turn = queue.lock().await;
            let Some(batch) = turn.as_mut() else {
                return self.begin_batch(queue, turn).await;
            };
            if batch.complete >= MOST || batch.begun.elapsed() > OPEN {
                // The task that commits the batch is queued by now, or will be.
                drop(turn);
                tokio::task::yield_now().await;
                continue;
            }
            match batch.begin_next().await {
                Ok(savepoint) => return Ok(self.new_change(queue, turn, Some(savepoint))),
                // The transaction has ended or cannot be used. This change can have another one.
                Err(error) => self.give_up(&mut turn, &error),
            }
        }
    }

    /// Begins a batch with its first change.
    async fn begin_batch<'a>(
        &'a self,
        queue: &'a Turn,
        mut turn: MutexGuard<'a, Option<Batch>>,
    ) -> Result<Change<'a>> {
        let connection = self.pool.acquire().await.map_err(|e| failed("begin", &e))?;
        *turn = Some(Batch {
            connection,
            begun: Instant::now(),
            savepoints: 0,
            complete: 0,
            undo: None,
            events: Vec::new(),
            outcome: watch::Sender::default(),
        });
        // It ends the batch where it is dropped.
        let mut change = self.new_change(queue, turn, None);
        let begin = match self.is_postgres {
            true => POSTGRES_BEGIN,
            false => "BEGIN",
        };
        let begun = sqlx::raw_sql(begin).execute(change.connection()).await;
        begun.map_err(|error| failed("begin", &error))?;
        Ok(change)
    }

    fn new_change<'a>(
        &'a self,
        queue: &'a Turn,
        batch: MutexGuard<'a, Option<Batch>>,
        savepoint: Option<u32>,
    ) -> Change<'a> {
        Change {
            batch,
            queue,
            savepoint,
            term: None,
            is_complete: false,
            events: Vec::new(),
            store: self,
        }
    }

    /// Ends a batch that cannot be committed.
    fn give_up(&self, batch: &mut Option<Batch>, error: &Error) {
        if let Some(mut batch) = batch.take() {
            batch.connection.close_on_drop();
            batch.outcome.send_replace(Some(Err(error.clone())));
        }
    }

    /// Commits the batch of a queue in its turn, and then publishes its events.
    async fn commit_batch(self, queue: Turn) {
        let mut turn = queue.lock().await;
        let Some(batch) = turn.as_mut() else {
            return;
        };
        if let Err(error) = batch.commit(self.is_postgres).await {
            self.give_up(&mut turn, &error);
            return;
        }
        let Some(batch) = turn.take() else {
            return;
        };
        self.changes.fetch_add(1, Ordering::Release);
        match &self.relay {
            // Events of all controllers are published in their order.
            Some(relay) => relay.wake(),
            None => {
                for event in batch.events {
                    // There may be no receiver.
                    let _ = self.news.send(event);
                }
            }
        }
        batch.outcome.send_replace(Some(Ok(())));
    }
}

impl Batch {
    async fn run(&mut self, action: &str, statement: String) -> Result<()> {
        // The text is made of literals and numbers of this file.
        let statement = sqlx::raw_sql(AssertSqlSafe(statement));
        let done = statement.execute(&mut *self.connection).await;
        done.map(drop).map_err(|error| failed(action, &error))
    }

    /// Begins the next change, and returns its savepoint.
    ///
    /// Each step can be dropped at any moment: what is undone twice is undone, and a savepoint that may
    /// be there or not has no statements behind it.
    async fn begin_next(&mut self) -> Result<u32> {
        self.undo().await?;
        self.savepoints += 1;
        let savepoint = self.savepoints;
        self.run("begin", format!("SAVEPOINT change_{savepoint}"))
            .await?;
        Ok(savepoint)
    }

    /// Undoes what was given up.
    async fn undo(&mut self) -> Result<()> {
        if let Some(savepoint) = self.undo {
            let undo = format!("ROLLBACK TO SAVEPOINT change_{savepoint}");
            self.run("undo", undo).await?;
            self.undo = None;
        }
        Ok(())
    }

    async fn commit(&mut self, is_postgres: bool) -> Result<()> {
        self.undo().await?;
        let commit = match is_postgres {
            true => POSTGRES_COMMIT,
            false => "COMMIT",
        };
        self.run("commit", commit.to_owned()).await
    }
}

impl Change<'_> {
    pub(super) fn connection(&mut self) -> &mut AnyConnection {
        // It was put there before the change, which alone takes it away, when it is dropped.
        let batch = self.batch.as_mut().expect("a change has a batch");
        &mut batch.connection
    }

    /// Commits the transaction, and then publishes its events.
    ///
    /// # Errors
    /// [`ErrorKind::Superseded`] where the term of this process has ended.
    pub(super) async fn commit(mut self) -> Result<()> {
        self.check_term().await?;
        let outcome = self.complete();
        drop(self);
        let unknown = || {
            let message = "the store failed (commit): the transaction was abandoned";
            Err(Error::new(ErrorKind::Internal, message))
        };
        let Some(mut outcome) = outcome else {
            return unknown();
        };
        match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or_else(unknown),
            // The task that commits has ended with the runtime.
            Err(_) => unknown(),
        }
    }

    /// Leaves the change to be committed with its batch. Returns what becomes of it.
    fn complete(&mut self) -> Option<watch::Receiver<Option<Result<()>>>> {
        let batch = self.batch.as_mut()?;
        batch.events.append(&mut self.events);
        batch.complete += 1;
        self.is_complete = true;
        if batch.complete == 1 {
            tokio::spawn(self.store.clone().commit_batch(Arc::clone(self.queue)));
        }
        Some(batch.outcome.subscribe())
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if self.is_complete {
            return;
        }
        match (self.savepoint, self.batch.as_mut()) {
            (Some(savepoint), Some(batch)) => batch.undo = Some(savepoint),
            // There is nothing else in the batch.
            (None, _) => {
                if let Some(mut batch) = self.batch.take() {
                    batch.connection.close_on_drop();
                }
            }
            (Some(_), None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::Database;
    use crate::testing::Postgres;

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let url = Database::sqlite_url(&dir.path().join("army.db"));
        (dir, Store::open(&url).await.unwrap())
    }

    async fn insert(change: &mut Change<'_>, name: &str) -> sqlx::Result<()> {
        let insert = sqlx::query("INSERT INTO tenants (name) VALUES ($1)").bind(name);
        insert.execute(change.connection()).await.map(drop)
    }

    async fn tenants(store: &Store) -> Vec<String> {
        let tenants = store.tenants().await.unwrap();
        tenants.into_iter().map(|tenant| tenant.name).collect()
    }

    /// Changes that gather while another one is made, and the moment when all of them wait.
    async fn gathered(store: &Store, names: &[&str]) -> Vec<tokio::task::JoinHandle<Result<()>>> {
        let holder = store.change().await.unwrap();
        let mut waiting = Vec::new();
        for name in names {
            let (store, name) = (store.clone(), (*name).to_owned());
            waiting.push(tokio::spawn(async move {
                let mut change = store.change().await?;
                match insert(&mut change, &name).await {
                    Ok(()) => change.commit().await,
                    Err(error) => Err(failed("query", &error)),
                }
            }));
            // They queue in this order.
            tokio::task::yield_now().await;
        }
        drop(holder);
        waiting
    }

    #[tokio::test]
    async fn changes_that_wait_for_each_other_share_one_commit() {
        let (_dir, store) = store().await;
        let before = store.changes();
        let waiting = gathered(&store, &["a", "b", "c", "d"]).await;
        for change in waiting {
            change.await.unwrap().unwrap();
        }
        assert_eq!(tenants(&store).await, ["a", "b", "c", "d"]);
        // The first one may have been committed before the others had their turn.
        assert!(store.changes() - before <= 2);
    }

    #[tokio::test]
    async fn a_change_that_fails_or_is_dropped_takes_nothing_of_others_with_it() {
        let (_dir, store) = store().await;
        let waiting = gathered(&store, &["a", "b", "a", "c", "c", "d"]).await;
        let mut succeeded = Vec::new();
        for change in waiting {
            succeeded.push(change.await.unwrap().is_ok());
        }
        assert_eq!(succeeded, [true, true, false, true, false, true]);
        assert_eq!(tenants(&store).await, ["a", "b", "c", "d"]);
        let mut dropped = store.change().await.unwrap();
        insert(&mut dropped, "e").await.unwrap();
        drop(dropped);
        let mut change = store.change().await.unwrap();
        insert(&mut change, "e").await.unwrap();
        change.commit().await.unwrap();
        assert_eq!(tenants(&store).await.len(), 5);
    }

    #[tokio::test]
    async fn a_change_that_is_given_up_in_a_batch_is_undone_by_whoever_is_next() {
        let (_dir, store) = store().await;
        let mut first = store.change().await.unwrap();
        insert(&mut first, "a").await.unwrap();
        let outcome = first.complete().unwrap();
        drop(first);
        // The task that commits has not had its turn: this test has one thread.
        let mut second = store.change().await.unwrap();
        assert_eq!(second.savepoint, Some(1));
        insert(&mut second, "b").await.unwrap();
        drop(second);
        let mut third = store.change().await.unwrap();
        insert(&mut third, "c").await.unwrap();
        third.commit().await.unwrap();
        assert_eq!(*outcome.borrow(), Some(Ok(())));
        assert_eq!(tenants(&store).await, ["a", "c"]);
    }

    #[tokio::test]
    async fn a_transaction_that_the_database_has_ended_fails_for_all_of_its_changes() {
        let (_dir, store) = store().await;
        let mut first = store.change().await.unwrap();
        insert(&mut first, "a").await.unwrap();
        let outcome = first.complete().unwrap();
        drop(first);
        let mut second = store.change().await.unwrap();
        // As a full disk does it.
        let end = sqlx::raw_sql("ROLLBACK").execute(second.connection());
        end.await.unwrap();
        drop(second);
        let mut third = store.change().await.unwrap();
        assert_eq!(third.savepoint, None);
        insert(&mut third, "c").await.unwrap();
        third.commit().await.unwrap();
        assert!(matches!(*outcome.borrow(), Some(Err(_))));
        assert_eq!(tenants(&store).await, ["c"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_term_is_renewed_although_many_changes_wait() {
        let postgres = Postgres::start(Path::new("/tmp"), &["-F"]).unwrap();
        let postgres = postgres.expect("PostgreSQL is missing: cargo xtask setup");
        let url = postgres.create_database("army").unwrap();
        let store = Store::open(&url).await.unwrap();
        let slow = (0..100).map(|number| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut change = store.change().await.unwrap();
                insert(&mut change, &format!("t{number}")).await.unwrap();
                tokio::time::sleep(Duration::from_millis(30)).await;
                change.commit().await.unwrap();
            })
        });
        let slow: Vec<_> = slow.collect();
        while tenants(&store).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        store.keep_term(false).await.unwrap();
        assert!(tenants(&store).await.len() < slow.len());
        for change in slow {
            change.await.unwrap();
        }
        assert_eq!(tenants(&store).await.len(), 100);
    }

    #[tokio::test]
    async fn a_batch_has_a_limit() {
        let (_dir, store) = store().await;
        let names: Vec<String> = (0..MOST * 2).map(|number| format!("t{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let before = store.changes();
        for change in gathered(&store, &names).await {
            change.await.unwrap().unwrap();
        }
        assert_eq!(tenants(&store).await.len(), names.len());
        assert!(store.changes() - before >= 2);
    }
}
