//! The events of all controllers of a PostgreSQL database, in their order, for readers in this
//! process. Each transaction notifies all controllers, which then read what is new.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use army_api::events::Event;
use sqlx::AnyPool;
use sqlx::postgres::PgListener;
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinHandle;

use super::{Store, events, failed};
use crate::Result;

/// The channel of the notifications.
const CHANNEL: &str = "army";
/// How often the database is read without a notification: one may be lost with its connection.
const ROUND: Duration = Duration::from_secs(1);

/// A task that publishes events, which ends when this is dropped.
pub(super) struct Relay {
    /// Wakes the task for a transaction of this process.
    own: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Relay {
    /// Publishes the events of the database at `url` from now on.
    pub(super) async fn start(url: &str, store: &Store) -> Result<Self> {
        let listening = |error| failed("listen for changes", &error);
        let mut listener = PgListener::connect(url).await.map_err(listening)?;
        listener.listen(CHANNEL).await.map_err(listening)?;
        let own = Arc::new(Notify::new());
        let work = Work {
            pool: store.pool.clone(),
            news: store.news.clone(),
            changes: Arc::clone(&store.changes),
            last: store.last_event().await?,
            own: Arc::clone(&own),
        };
        Ok(Self {
            own,
            task: tokio::spawn(work.run(listener)),
        })
    }

    /// Publishes what a transaction of this process has added.
    pub(super) fn wake(&self) {
        self.own.notify_one();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The state of the task.
struct Work {
    pool: AnyPool,
    news: broadcast::Sender<Event>,
    changes: Arc<AtomicU64>,
    /// The id of the last event that was published.
    last: i64,
    own: Arc<Notify>,
}

impl Work {
    async fn run(mut self, mut listener: PgListener) {
        loop {
            tokio::select! {
                () = self.own.notified() => {}
                () = tokio::time::sleep(ROUND) => {}
                // A lost connection is made again by the next call.
                lost = listener.try_recv() => if let Err(error) = lost {
                    tracing::warn!(%error, "cannot listen for changes of other controllers");
                    tokio::time::sleep(ROUND).await;
                }
            }
            self.changes.fetch_add(1, Ordering::Release);
            if let Err(error) = self.publish().await {
                tracing::warn!(%error, "cannot read events");
            }
        }
    }

    async fn publish(&mut self) -> Result<()> {
        loop {
            let page = events::page(&self.pool, self.last, None).await?;
            let Some(newest) = page.last() else {
                return Ok(());
            };
            self.last = newest.id;
            for event in page {
                // There may be no receiver.
                let _ = self.news.send(event);
            }
        }
    }
}
