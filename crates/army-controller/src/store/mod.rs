//! What the controller remembers: one file for each kind of thing, all of the SQL in here.
//!
//! The SQL is what SQLite and PostgreSQL have in common, but for two functions' names in the list
//! of VMs. Every change that belongs together is one
//! transaction, so that a kill at any point leaves all of it or nothing.

pub(crate) mod events;
pub(crate) mod hosts;
pub(crate) mod keys;
mod migrations;
pub(crate) mod requests;
pub(crate) mod templates;
pub(crate) mod vms;

use std::sync::Arc;

use crate::{Error, ErrorKind, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::any::{AnyPoolOptions, AnyRow};
use sqlx::pool::PoolConnection;
use sqlx::{AnyConnection, AnyPool, Connection as _, Row};
use tokio::sync::{Mutex, MutexGuard, broadcast};

use army_api::events::Event;

/// Connections to the database, for readers.
const CONNECTIONS: u32 = 8;
/// Events that a slow reader may be behind before it has to read the database.
const EVENTS_AHEAD: usize = 1024;
/// For each connection. Writers wait for each other; a kill loses nothing that was committed.
const SQLITE_SETTINGS: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; \
     PRAGMA busy_timeout = 10000; PRAGMA foreign_keys = ON;";

/// The lock that a controller holds in PostgreSQL while it lives: two would undo each other's work.
const POSTGRES_LOCK: i64 = 0x41_52_4d_59;
/// How a PostgreSQL database is named.
const POSTGRES: [&str; 2] = ["postgres://", "postgresql://"];

/// The database.
#[derive(Clone)]
pub(crate) struct Store {
    pool: AnyPool,
    is_postgres: bool,
    /// Holds the lock of a shared database.
    _lock: Option<Arc<Mutex<AnyConnection>>>,
    /// Writers take turns here and not in the database, where they would have to try again.
    turn: Arc<Mutex<()>>,
    news: broadcast::Sender<Event>,
}

impl Store {
    /// The database at `url`, of SQLite or PostgreSQL, brought into the latest form.
    pub(crate) async fn open(url: &str) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let is_postgres = POSTGRES.iter().any(|scheme| url.starts_with(scheme));
        if !is_postgres && !url.starts_with("sqlite:") {
            let message = "the database URL must begin with `postgres://` or `sqlite://`";
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        let lock = match is_postgres {
            true => Some(Arc::new(Mutex::new(lock(url).await?))),
            false => None,
        };
        let pool = AnyPoolOptions::new()
            .max_connections(CONNECTIONS)
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
        Ok(Self {
            pool,
            is_postgres,
            _lock: lock,
            turn: Arc::default(),
            news: broadcast::channel(EVENTS_AHEAD).0,
        })
    }

    /// Begins a change. It is undone unless it is committed.
    async fn change(&self) -> Result<Change<'_>> {
        let turn = self.turn.lock().await;
        let connection = self.pool.acquire().await.map_err(|e| failed("begin", &e))?;
        let mut change = Change {
            connection,
            committed: false,
            events: Vec::new(),
            news: &self.news,
            _turn: turn,
        };
        change.run("BEGIN").await.map_err(|e| failed("begin", &e))?;
        Ok(change)
    }
}

/// Takes the lock of a PostgreSQL database; it is held as long as the connection.
async fn lock(url: &str) -> Result<AnyConnection> {
    let opened = |error| failed("open the store", &error);
    let mut connection = AnyConnection::connect(url).await.map_err(opened)?;
    let row = sqlx::query("SELECT pg_try_advisory_lock($1) AS taken")
        .bind(POSTGRES_LOCK)
        .fetch_one(&mut connection)
        .await
        .map_err(opened)?;
    match row.try_get("taken").map_err(opened)? {
        true => Ok(connection),
        false => {
            let message = "another Army server uses this database";
            Err(Error::new(ErrorKind::Conflict, message).advise("stop it, or use another database"))
        }
    }
}

/// A change to the store, and the events that it is.
///
/// One that is not committed takes its connection with it. Where SQLite cannot write it may end the
/// transaction by itself, or leave it open when it is asked to end it: the driver's own transactions
/// lose count then, and their connection stays in the past, with reads that are old and writes that
/// fail.
struct Change<'a> {
    connection: PoolConnection<sqlx::Any>,
    committed: bool,
    events: Vec<Event>,
    news: &'a broadcast::Sender<Event>,
    _turn: MutexGuard<'a, ()>,
}

impl Change<'_> {
    fn connection(&mut self) -> &mut AnyConnection {
        &mut self.connection
    }

    async fn run(&mut self, statement: &'static str) -> sqlx::Result<()> {
        let done = sqlx::raw_sql(statement).execute(self.connection()).await;
        done.map(drop)
    }

    /// Makes the change; only then are its events told.
    async fn commit(mut self) -> Result<()> {
        self.run("COMMIT").await.map_err(|e| failed("commit", &e))?;
        self.committed = true;
        for event in self.events.drain(..) {
            // Nobody may be listening.
            let _ = self.news.send(event);
        }
        Ok(())
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if !self.committed {
            self.connection.close_on_drop();
        }
    }
}

fn failed(action: &str, error: &sqlx::Error) -> Error {
    let message = format!("the store failed ({action}): {error}");
    Error::new(ErrorKind::Internal, message)
}

fn query_failed(error: sqlx::Error) -> Error {
    failed("query", &error)
}

/// Whether it failed because something of that name is there.
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

/// The word that a value of a simple enum is written as.
fn word(value: &impl Serialize) -> Result<String> {
    Ok(to_json(value)?.trim_matches('"').to_owned())
}

fn from_word<T: DeserializeOwned>(word: &str) -> Result<T> {
    parse(&format!("\"{word}\""))
}
