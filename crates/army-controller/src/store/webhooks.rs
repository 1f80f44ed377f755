//! Webhooks: where events are sent, and how far that is.

use army_api::webhooks::Webhook;
use army_node_api::time::now_ms;
use sqlx::any::AnyRow;

use super::{
    Store, json, number, optional_text, query_failed, readable, stored, text, to_json, unsigned,
};
use crate::{Error, ErrorKind, Result};

/// The most webhooks of a tenant.
const MAX_WEBHOOKS: i64 = 20;
/// The most webhooks that are looked at in a round.
const ROUND: i64 = 1000;

/// A webhook with what a delivery needs.
#[derive(Debug, Clone)]
pub(crate) struct DueWebhook {
    pub(crate) webhook: Webhook,
    pub(crate) secret: String,
    /// Whether it may lead to addresses that are not public.
    pub(crate) is_trusted: bool,
    /// When the present series of failures began, in milliseconds since 1970.
    pub(crate) failing_since_ms: Option<u64>,
}

impl Store {
    /// Records a webhook.
    ///
    /// # Errors
    /// [`ErrorKind::QuotaExceeded`] where the tenant has too many.
    pub(crate) async fn insert_webhook(&self, new: &DueWebhook) -> Result<()> {
        let mut change = self.change().await?;
        let webhook = &new.webhook;
        let row = sqlx::query("SELECT COUNT(*) AS n FROM webhooks WHERE tenant = $1")
            .bind(&webhook.tenant)
            .fetch_one(change.connection())
            .await
            .map_err(query_failed)?;
        if number(&row, "n")? >= MAX_WEBHOOKS {
            let message = format!("a tenant has at most {MAX_WEBHOOKS} webhooks");
            return Err(
                Error::new(ErrorKind::QuotaExceeded, message).advise("remove one: army webhook rm")
            );
        }
        sqlx::query(
            "INSERT INTO webhooks (id, tenant, url, events, secret, trusted, created_ms, delivered, \
             failures, due_ms, disabled) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 0, 0, 0)",
        )
        .bind(&webhook.id)
        .bind(&webhook.tenant)
        .bind(&webhook.url)
        .bind(to_json(&webhook.events)?)
        .bind(&new.secret)
        .bind(i64::from(new.is_trusted))
        .bind(stored(webhook.created_ms))
        .bind(webhook.delivered)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change
            .event("webhook.created", &webhook.id, &webhook.tenant, "created")
            .await?;
        change.commit().await
    }

    /// The webhooks of one tenant, or all, the oldest first.
    pub(crate) async fn webhooks(&self, tenant: Option<&str>) -> Result<Vec<Webhook>> {
        let rows = sqlx::query(
            "SELECT * FROM webhooks WHERE $1 = '*' OR tenant = $1 ORDER BY created_ms, id",
        )
        .bind(tenant.unwrap_or("*"))
        .fetch_all(&self.pool)
        .await
        .map_err(query_failed)?;
        Ok(readable(&rows, "webhooks", webhook))
    }

    /// Removes a webhook, only of `tenant` where one is given.
    pub(crate) async fn remove_webhook(&self, id: &str, tenant: Option<&str>) -> Result<()> {
        let mut change = self.change().await?;
        let removed = sqlx::query(
            "DELETE FROM webhooks WHERE id = $1 AND ($2 = '*' OR tenant = $2) RETURNING tenant",
        )
        .bind(id)
        .bind(tenant.unwrap_or("*"))
        .fetch_optional(change.connection())
        .await
        .map_err(query_failed)?;
        let Some(row) = removed else {
            let message = format!("webhook `{}` not found", id.escape_debug());
            return Err(Error::new(ErrorKind::NotFound, message));
        };
        let tenant = text(&row, "tenant")?;
        change
            .event("webhook.removed", id, &tenant, "removed")
            .await?;
        change.commit().await
    }

    /// The webhooks that have something to deliver: there are events after the last one, and no
    /// pause after a failure.
    pub(crate) async fn due_webhooks(&self) -> Result<Vec<DueWebhook>> {
        let rows = sqlx::query(
            "SELECT * FROM webhooks WHERE disabled = 0 AND due_ms <= $1 \
             AND delivered < (SELECT COALESCE(MAX(id), 0) FROM events) ORDER BY due_ms LIMIT $2",
        )
        .bind(stored(now_ms()))
        .bind(ROUND)
        .fetch_all(&self.pool)
        .await
        .map_err(query_failed)?;
        Ok(readable(&rows, "webhooks", |row| {
            let since: Option<i64> =
                sqlx::Row::try_get(row, "failing_since_ms").map_err(query_failed)?;
            Ok(DueWebhook {
                webhook: webhook(row)?,
                secret: text(row, "secret")?,
                is_trusted: number(row, "trusted")? != 0,
                failing_since_ms: since.map(|time| time.max(0).unsigned_abs()),
            })
        }))
    }

    /// Records that everything up to the event `id` was delivered, or is of no interest.
    pub(crate) async fn record_delivered(&self, webhook: &str, id: i64) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query(
            "UPDATE webhooks SET delivered = $1, failures = 0, due_ms = 0, error = NULL, \
             failing_since_ms = NULL WHERE id = $2 AND delivered < $1",
        )
        .bind(id)
        .bind(webhook)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await
    }

    /// Records a delivery that failed, and when to try again; never where that is `None`.
    pub(crate) async fn record_failed_delivery(
        &self,
        failed: &DueWebhook,
        error: &str,
        due_ms: Option<u64>,
    ) -> Result<()> {
        let mut change = self.change().await?;
        let webhook = &failed.webhook;
        sqlx::query(
            "UPDATE webhooks SET failures = failures + 1, error = $1, due_ms = $2, disabled = $3, \
             failing_since_ms = COALESCE(failing_since_ms, $4) WHERE id = $5",
        )
        .bind(error)
        .bind(stored(due_ms.unwrap_or(0)))
        .bind(i64::from(due_ms.is_none()))
        .bind(stored(now_ms()))
        .bind(&webhook.id)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        if due_ms.is_none() {
            let detail = format!("nothing could be delivered for days: {error}");
            change
                .event("webhook.disabled", &webhook.id, &webhook.tenant, &detail)
                .await?;
        }
        change.commit().await
    }
}

#[cfg(test)]
impl Store {
    /// Makes an event of a tenant's VM.
    pub(crate) async fn vm_event(&self, tenant: &str) -> Result<()> {
        let mut change = self.change().await?;
        change.event("vm.running", "a", tenant, "").await?;
        change.commit().await
    }

    /// Ends the pauses of all webhooks, as if their failures had begun earlier by so many
    /// milliseconds.
    pub(crate) async fn hurry_webhooks(&self, earlier_ms: i64) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE webhooks SET due_ms = 0, failing_since_ms = failing_since_ms - $1")
            .bind(earlier_ms)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }
}

fn webhook(row: &AnyRow) -> Result<Webhook> {
    let failures = number(row, "failures")?.max(0);
    Ok(Webhook {
        id: text(row, "id")?,
        tenant: text(row, "tenant")?,
        url: text(row, "url")?,
        events: json(row, "events")?,
        created_ms: unsigned(row, "created_ms")?,
        delivered: number(row, "delivered")?,
        failures: u32::try_from(failures).unwrap_or(u32::MAX),
        error: optional_text(row, "error")?,
        disabled: number(row, "disabled")? != 0,
    })
}
