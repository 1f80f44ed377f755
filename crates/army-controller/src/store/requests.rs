//! Requests with an idempotency key, and their answers.

use super::{Store, optional_text, query_failed, stored, text};
use crate::{Error, ErrorKind, Result};
use army_node_api::time::now_ms;

/// How long an answer is kept.
const KEPT_MS: u64 = 24 * 60 * 60 * 1000;

/// What is known of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum KnownRequest {
    /// The request is new, and the caller answers it.
    New,
    /// The request was answered with this text.
    Answered(String),
}

impl Store {
    /// Records a request, unless it is known.
    ///
    /// # Errors
    /// [`ErrorKind::IdempotencyMismatch`] where the key came with another request, and
    /// [`ErrorKind::Conflict`] while the first one is in progress.
    pub(crate) async fn begin_request(
        &self,
        tenant: &str,
        key: &str,
        content: &str,
    ) -> Result<KnownRequest> {
        let hash = blake3::hash(content.as_bytes()).to_hex().to_string();
        let now = now_ms();
        let mut change = self.change().await?;
        sqlx::query("DELETE FROM requests WHERE created_ms < $1 AND answer IS NOT NULL")
            .bind(stored(now.saturating_sub(KEPT_MS)))
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        let inserted = sqlx::query(
            "INSERT INTO requests (tenant, request, hash, created_ms) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (tenant, request) DO NOTHING",
        )
        .bind(tenant)
        .bind(key)
        .bind(&hash)
        .bind(stored(now))
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        if inserted.rows_affected() > 0 {
            change.commit().await?;
            return Ok(KnownRequest::New);
        }
        let row =
            sqlx::query("SELECT hash, answer FROM requests WHERE tenant = $1 AND request = $2")
                .bind(tenant)
                .bind(key)
                .fetch_one(change.connection())
                .await
                .map_err(query_failed)?;
        if text(&row, "hash")? != hash {
            let message = "this idempotency key was used with another request before";
            return Err(Error::new(ErrorKind::IdempotencyMismatch, message)
                .advise("use a new key for each request, and the same key only to repeat one"));
        }
        match optional_text(&row, "answer")? {
            Some(answer) => Ok(KnownRequest::Answered(answer)),
            None => Err(Error::new(
                ErrorKind::Conflict,
                "the first request with this idempotency key is still in progress",
            )
            .retry_after(1)),
        }
    }

    /// Records the answer to a request.
    pub(crate) async fn answer_request(&self, tenant: &str, key: &str, answer: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE requests SET answer = $1 WHERE tenant = $2 AND request = $3")
            .bind(answer)
            .bind(tenant)
            .bind(key)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }

    /// Removes a request that failed, so that it can be tried again.
    pub(crate) async fn discard_request(&self, tenant: &str, key: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("DELETE FROM requests WHERE tenant = $1 AND request = $2 AND answer IS NULL")
            .bind(tenant)
            .bind(key)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }

    /// The requests without an answer, as tenant and key.
    pub(crate) async fn unanswered_requests(&self) -> Result<Vec<(String, String)>> {
        let rows = sqlx::query("SELECT tenant, request FROM requests WHERE answer IS NULL")
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        rows.iter()
            .map(|row| Ok((text(row, "tenant")?, text(row, "request")?)))
            .collect()
    }
}
