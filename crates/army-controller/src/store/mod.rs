//! The database: one file for each kind of record, and all of the SQL.
//!
//! The SQL is what SQLite and PostgreSQL have in common, except for the names of two functions in
//! the list of VMs. Changes that belong together are one transaction, so that a kill at any point
//! leaves all of them or none; `transactions` has how they are made and committed.

pub(crate) mod changes;
pub(crate) mod creation;
pub(crate) mod events;
#[cfg(any(test, feature = "testing"))]
mod filling;
pub(crate) mod hosts;
pub(crate) mod keys;
mod labels;
pub(crate) mod leases;
mod migrations;
pub(crate) mod moves;
pub(crate) mod operations;
#[cfg(test)]
mod plans;
mod relay;
pub(crate) mod reservations;
mod shards;
pub(crate) mod template_names;
pub(crate) mod templates;
pub(crate) mod tenants;
mod transactions;
#[cfg(test)]
mod upgrade_tests;
mod vm_pages;
pub(crate) mod vm_states;
pub(crate) mod vms;
pub(crate) mod webhooks;

use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, ErrorKind, Result};
use leases::OwnTerm;
use relay::Relay;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::any::{AnyPoolOptions, AnyRow};
use sqlx::{AnyPool, Row};
use tokio::sync::broadcast;
use transactions::{Change, Turn};

use army_api::events::Event;

/// The number of connections to the database.
const CONNECTIONS: u32 = 8;
/// The number of events that a slow reader may miss before it has to read the database.
const EVENTS_AHEAD: usize = 1024;
/// The settings of each connection. Writers wait for each other, and neither a kill of the process
/// nor a loss of power loses what was committed.
const SQLITE_SETTINGS: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
     PRAGMA busy_timeout = 10000; PRAGMA foreign_keys = ON;";

/// The schemes of the URLs of PostgreSQL databases.
const POSTGRES: [&str; 2] = ["postgres://", "postgresql://"];

/// The database.
#[derive(Clone)]
pub(crate) struct Store {
    pool: AnyPool,
    is_postgres: bool,
    term: OwnTerm,
    /// Where changes queue.
    turn: Turn,
    /// Where changes queue that others must not delay. With SQLite, which has one writer at a time, it
    /// is the same queue, and nobody ends terms by their leases.
    urgent: Turn,
    news: broadcast::Sender<Event>,
    /// Grows with each transaction that may have changed VMs, of this process or another.
    changes: Arc<AtomicU64>,
    /// Grows with each change of hosts by this process.
    host_changes: Arc<AtomicU64>,
    /// What brings the events of other controllers; `None` where there can be none.
    relay: Option<Arc<Relay>>,
}

impl Store {
    /// Opens the database at `url`, of SQLite or PostgreSQL, and migrates it to the latest version.
    pub(crate) async fn open(url: &str) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let is_postgres = POSTGRES.iter().any(|scheme| url.starts_with(scheme));
        if !is_postgres && !url.starts_with("sqlite:") {
            let message = "the database URL must begin with `postgres://` or `sqlite://`";
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        if !is_postgres {
            protect(url).map_err(|error| {
                let message = format!("cannot protect the database: {error}");
                Error::new(ErrorKind::Internal, message)
            })?;
        }
        let pool = AnyPoolOptions::new()
            .max_connections(CONNECTIONS)
            // A server may have ended an idle connection. A file does not.
            .test_before_acquire(is_postgres)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    if is_postgres {
                        return Ok(());
                    }
                    sqlx::raw_sql(SQLITE_SETTINGS)
                        .execute(&mut *connection)
                        .await
                        .map(drop)
                })
            })
            .connect(url)
            .await
            .map_err(|error| failed("open the store", &error))?;
        migrations::all().run(&pool).await.map_err(|error| {
            let message = format!("cannot migrate the database to the latest version: {error}");
            Error::new(ErrorKind::Internal, message)
        })?;
        let turn = Turn::default();
        let mut store = Self {
            pool,
            is_postgres,
            term: OwnTerm::new()?,
            urgent: match is_postgres {
                true => Turn::default(),
                false => Arc::clone(&turn),
            },
            turn,
            news: broadcast::channel(EVENTS_AHEAD).0,
            changes: Arc::default(),
            host_changes: Arc::default(),
            relay: None,
        };
        store.begin_term().await?;
        if is_postgres {
            store.relay = Some(Arc::new(Relay::start(url, &store).await?));
        }
        Ok(store)
    }

    /// A number that grows with each transaction that may have changed VMs.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// A number that grows with each change of hosts by this process. Other processes may change
    /// hosts only where [`is_shared`](Self::is_shared).
    pub(crate) fn host_changes(&self) -> u64 {
        self.host_changes.load(Ordering::Acquire)
    }

    fn note_host_change(&self) {
        self.host_changes.fetch_add(1, Ordering::Release);
    }

    /// Whether other controllers may use the database.
    pub(crate) fn is_shared(&self) -> bool {
        self.is_postgres
    }
}

/// Makes the files of an SQLite database readable by their owner only: they have everybody's
/// environment variables and the hashes of keys. SQLite gives the files beside the database the
/// database's own permissions.
fn protect(url: &str) -> std::io::Result<()> {
    let path = url.trim_start_matches("sqlite:").trim_start_matches("//");
    let (path, options) = path.split_once('?').unwrap_or((path, ""));
    if path.is_empty() || path == ":memory:" {
        return Ok(());
    }
    if options.contains("mode=rwc") {
        let mut create = OpenOptions::new();
        create.create(true).append(true).mode(0o600).open(path)?;
    }
    for suffix in ["", "-wal", "-shm"] {
        let private = Permissions::from_mode(0o600);
        match std::fs::set_permissions(format!("{path}{suffix}"), private) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn failed(action: &str, error: &sqlx::Error) -> Error {
    let message = format!("the store failed ({action}): {error}");
    Error::new(ErrorKind::Internal, message)
}

fn query_failed(error: sqlx::Error) -> Error {
    failed("query", &error)
}

/// Whether a query failed because a name is taken.
fn is_taken(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.is_unique_violation())
}

fn text(row: &AnyRow, column: &str) -> Result<String> {
    row.try_get(column).map_err(query_failed)
}

fn optional_text(row: &AnyRow, column: &str) -> Result<Option<String>> {
    row.try_get(column).map_err(query_failed)
}

fn number(row: &AnyRow, column: &str) -> Result<i64> {
    row.try_get(column).map_err(query_failed)
}

fn unsigned(row: &AnyRow, column: &str) -> Result<u64> {
    Ok(number(row, column)?.max(0) as u64)
}

/// A number as the database holds it. One beyond the database's range becomes the largest, and never
/// a negative one.
fn stored(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The rows of a list that can be read. A row that cannot is logged and left out: one bad record must
/// not make all others unreachable.
fn readable<T>(
    rows: &[AnyRow],
    table: &'static str,
    read: impl Fn(&AnyRow) -> Result<T>,
) -> Vec<T> {
    let read = |row| match read(row) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::error!(table, %error, "a record cannot be read and is left out");
            None
        }
    };
    rows.iter().filter_map(read).collect()
}

fn json<T: DeserializeOwned>(row: &AnyRow, column: &str) -> Result<T> {
    parse(&text(row, column)?)
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        let message = format!("the database contains an invalid value: {error}");
        Error::new(ErrorKind::Internal, message)
    })
}

fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))
}

/// The word for a value of an enum without data.
fn word(value: &impl Serialize) -> Result<String> {
    Ok(to_json(value)?.trim_matches('"').to_owned())
}

fn from_word<T: DeserializeOwned>(word: &str) -> Result<T> {
    parse(&format!("\"{word}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_owner_reads_the_database_which_survives_a_loss_of_power() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("army.db");
        // The file of a former release could be read by everybody.
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let url = crate::Database::sqlite_url(&path);
        let store = Store::open(&url).await.unwrap();
        store.has_keys().await.unwrap();
        let files = std::fs::read_dir(dir.path()).unwrap();
        for file in files.map(|file| file.unwrap()) {
            let mode = file.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{:?}", file.path());
        }
        let row = sqlx::query("PRAGMA synchronous")
            .fetch_one(&store.pool)
            .await;
        assert_eq!(row.unwrap().try_get::<i64, _>(0).unwrap(), 2);
    }
}
