//! Events. Each is recorded in the transaction of the change that it describes.

use army_api::events::Event;
use army_api::vms::Vm;
use sqlx::AnyPool;
use sqlx::any::AnyRow;
use tokio::sync::broadcast;

use super::{Change, Store, number, query_failed, readable, stored, text, unsigned};
use crate::audience::{self, Audience};
use crate::{Actor, Result};
use army_node_api::time::now_ms;

/// The number of events that are kept.
const KEPT: i64 = 100_000;
/// The most events that one read returns.
const PAGE: i64 = 1000;

impl Change<'_> {
    /// Adds an event that describes this change.
    pub(super) async fn event(
        &mut self,
        kind: &str,
        subject: &str,
        tenant: &str,
        detail: &str,
    ) -> Result<()> {
        debug_assert!(
            audience::decided(kind).is_some(),
            "`{kind}` has no audience: decide who gets to know of it"
        );
        let time_ms = now_ms();
        let actor = Actor::current().name().to_owned();
        let row = sqlx::query(
            "INSERT INTO events (id, time_ms, kind, subject, tenant, detail, actor) \
             SELECT COALESCE(MAX(id), 0) + 1, $1, $2, $3, $4, $5, $6 FROM events RETURNING id",
        )
        .bind(stored(time_ms))
        .bind(kind)
        .bind(subject)
        .bind(tenant)
        .bind(detail)
        .bind(&actor)
        .fetch_one(self.connection())
        .await
        .map_err(query_failed)?;
        let id = number(&row, "id")?;
        if id % 1000 == 0 {
            sqlx::query("DELETE FROM events WHERE id <= $1")
                .bind(id - KEPT)
                .execute(self.connection())
                .await
                .map_err(query_failed)?;
        }
        self.events.push(Event {
            id,
            time_ms,
            kind: kind.to_owned(),
            subject: subject.to_owned(),
            tenant: tenant.to_owned(),
            detail: detail.to_owned(),
            actor,
        });
        Ok(())
    }
}

impl Store {
    /// A page of the events after `id`, the oldest first: those that `tenant` gets to know of, or
    /// every event where no tenant is given.
    pub(crate) async fn events_after(&self, id: i64, tenant: Option<&str>) -> Result<Vec<Event>> {
        page(&self.pool, id, tenant).await
    }

    /// Records an event of a VM that changes nothing else in the database.
    pub(crate) async fn record_vm_event(&self, kind: &str, vm: &Vm, detail: &str) -> Result<()> {
        let mut change = self.change().await?;
        change.event(kind, &vm.id, &vm.tenant, detail).await?;
        change.commit().await
    }

    /// The id of the newest event; 0 where there is none.
    pub(crate) async fn last_event(&self) -> Result<i64> {
        let row = sqlx::query("SELECT COALESCE(MAX(id), 0) AS id FROM events")
            .fetch_one(&self.pool)
            .await
            .map_err(query_failed)?;
        number(&row, "id")
    }

    /// Receives events from now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.news.subscribe()
    }
}

/// See [`Store::events_after`].
pub(super) async fn page(pool: &AnyPool, id: i64, tenant: Option<&str>) -> Result<Vec<Event>> {
    let own = audience::sql_list(Audience::Tenant);
    let everybodys = audience::sql_list(Audience::TenantOrEverybody);
    let query = format!(
        "SELECT * FROM events WHERE id > $1 AND ($2 = '*' OR (tenant = $2 AND kind IN ({own})) \
         OR (tenant IN ($2, '') AND kind IN ({everybodys}))) ORDER BY id LIMIT $3"
    );
    // The text is made of literals of this crate.
    let rows = sqlx::query(sqlx::AssertSqlSafe(query))
        .bind(id)
        .bind(tenant.unwrap_or("*"))
        .bind(PAGE)
        .fetch_all(pool)
        .await
        .map_err(query_failed)?;
    Ok(readable(&rows, "events", event))
}

fn event(row: &AnyRow) -> Result<Event> {
    Ok(Event {
        id: number(row, "id")?,
        time_ms: unsigned(row, "time_ms")?,
        kind: text(row, "kind")?,
        subject: text(row, "subject")?,
        tenant: text(row, "tenant")?,
        detail: text(row, "detail")?,
        actor: text(row, "actor")?,
    })
}
