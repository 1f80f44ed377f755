//! Operations: what was requested, who carries it out, and what became of it.
//!
//! An operation is recorded in the transaction that reserves what it needs: the names of its VMs, or
//! of its template. It ends in the transaction that records what it has made. An operation that
//! nobody carries out any more is taken over by another controller.

use army_api::operations::{OperationFilter, OperationKind, OperationState};
use army_node_api::time::now_ms;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{
    Change, Store, from_word, number, optional_text, parse, query_failed, readable, stored, text,
    to_json, unsigned, word,
};
use crate::{Error, ErrorKind, Result};

/// The number of operations of a page, where the client does not say.
const PAGE: u32 = 100;
/// The most operations of a page.
const MAX_PAGE: u32 = 1000;

/// How a repetition of a request is recognized.
#[derive(Debug, Clone)]
pub(crate) struct Idempotency {
    /// The key that the client has chosen.
    pub(crate) key: String,
    /// The hash of what was requested.
    pub(crate) hash: String,
}

/// An operation that is about to begin.
#[derive(Debug, Clone)]
pub(crate) struct NewOperation {
    /// The id of the operation.
    pub(crate) id: String,
    /// The tenant of the caller.
    pub(crate) tenant: String,
    /// The id of the caller's key.
    pub(crate) actor: String,
    /// The kind of the operation.
    pub(crate) kind: OperationKind,
    /// The object that the operation is about.
    pub(crate) subject: String,
    /// What was requested, in JSON, without secrets.
    pub(crate) request: String,
    /// How a repetition is recognized; `None` where the request has no idempotency key.
    pub(crate) idempotency: Option<Idempotency>,
    /// The controller that carries the operation out.
    pub(crate) owner: String,
}

/// The record of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OperationRow {
    pub(crate) id: String,
    pub(crate) tenant: String,
    pub(crate) actor: String,
    pub(crate) kind: OperationKind,
    pub(crate) subject: String,
    pub(crate) state: OperationState,
    /// What was requested, in JSON.
    pub(crate) request: String,
    /// The controller that carries the operation out.
    pub(crate) owner: String,
    pub(crate) created_ms: u64,
    pub(crate) updated_ms: u64,
    pub(crate) ended_ms: Option<u64>,
    /// What the operation is doing, for people.
    pub(crate) progress: Option<String>,
    /// What cannot be computed from other rows of what was made, in JSON.
    pub(crate) result: Option<String>,
    /// Why the operation failed.
    pub(crate) error: Option<Error>,
}

/// The end of an operation.
#[derive(Debug, Clone)]
pub(crate) enum End {
    /// Something was made. What cannot be computed from other rows of it is here, as JSON.
    Succeeded(String),
    /// Nothing was made, so that the request can be tried again with the same key.
    Failed(Error),
    /// It is not known what was made, so that the request is not tried again with the same key.
    Unknown(Error),
}

impl End {
    /// The end of work that made something, or failed.
    pub(crate) fn of<T>(outcome: &Result<T>) -> Self {
        match outcome {
            Ok(_) => Self::Succeeded("{}".to_owned()),
            Err(error) => Self::Failed(error.clone()),
        }
    }
}

impl Store {
    /// The operation that an earlier request with the same idempotency key has begun.
    ///
    /// # Errors
    /// [`ErrorKind::IdempotencyMismatch`] where the key came with another request.
    pub(crate) async fn known_operation(
        &self,
        tenant: &str,
        idempotency: &Idempotency,
    ) -> Result<Option<OperationRow>> {
        let row = sqlx::query(OF_KEY)
            .bind(tenant)
            .bind(&idempotency.key)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        match row {
            Some(row) => matching(&row, idempotency),
            None => Ok(None),
        }
    }

    /// Records the end of an operation. An operation that has ended stays as it is.
    pub(crate) async fn end_operation(&self, id: &str, end: &End) -> Result<()> {
        let mut change = self.change().await?;
        change.end_operation(id, end).await?;
        change.commit().await
    }

    /// Records what an operation is doing.
    pub(crate) async fn set_progress(&self, id: &str, progress: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query(
            "UPDATE operations SET progress = $1, updated_ms = $2 \
             WHERE id = $3 AND state = 'running'",
        )
        .bind(progress)
        .bind(stored(now_ms()))
        .bind(id)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await
    }

    /// One operation; only one of `tenant` where a tenant is given.
    pub(crate) async fn operation(&self, id: &str, tenant: Option<&str>) -> Result<OperationRow> {
        let row =
            sqlx::query("SELECT * FROM operations WHERE id = $1 AND ($2 = '' OR tenant = $2)")
                .bind(id)
                .bind(tenant.unwrap_or_default())
                .fetch_optional(&self.pool)
                .await
                .map_err(query_failed)?;
        match row {
            Some(row) => operation(&row),
            None => {
                let message = format!("operation `{}` not found", id.escape_debug());
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }

    /// A page of operations, the newest first, and where the next page begins; only those of `tenant`
    /// where a tenant is given.
    pub(crate) async fn operations(
        &self,
        filter: &OperationFilter,
        tenant: Option<&str>,
    ) -> Result<(Vec<OperationRow>, Option<String>)> {
        let limit = filter.limit.unwrap_or(PAGE).clamp(1, MAX_PAGE);
        let (time, id) = match &filter.after {
            Some(after) => position(after)?,
            None => (i64::MAX, ""),
        };
        let word_of = |word: Result<String>| word.unwrap_or_default();
        let state = filter
            .state
            .map_or_else(String::new, |it| word_of(word(&it)));
        let kind = filter
            .kind
            .map_or_else(String::new, |it| word_of(word(&it)));
        let query = match tenant {
            Some(_) => {
                "SELECT * FROM operations WHERE tenant = $1 \
                 AND ($2 = '' OR state = $2) AND ($3 = '' OR kind = $3) \
                 AND (created_ms, id) < ($4, $5) ORDER BY created_ms DESC, id DESC LIMIT $6"
            }
            None => {
                "SELECT * FROM operations WHERE $1 = '' \
                 AND ($2 = '' OR state = $2) AND ($3 = '' OR kind = $3) \
                 AND (created_ms, id) < ($4, $5) ORDER BY created_ms DESC, id DESC LIMIT $6"
            }
        };
        let rows = sqlx::query(query)
            .bind(tenant.unwrap_or_default())
            .bind(state)
            .bind(kind)
            .bind(time)
            .bind(id)
            .bind(i64::from(limit) + 1)
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        let page = &rows[..rows.len().min(limit as usize)];
        let next = match page.last() {
            Some(last) if rows.len() > page.len() => Some(format!(
                "{}-{}",
                number(last, "created_ms")?,
                text(last, "id")?
            )),
            _ => None,
        };
        Ok((readable(page, "operations", operation), next))
    }

    /// The operations in progress of controllers whose terms have ended, except those of `owner`.
    pub(crate) async fn abandoned_operations(&self, owner: &str) -> Result<Vec<OperationRow>> {
        let rows = sqlx::query(
            "SELECT * FROM operations WHERE state = 'running' AND owner <> $1 \
             AND owner NOT IN (SELECT id FROM controllers)",
        )
        .bind(owner)
        .fetch_all(&self.pool)
        .await
        .map_err(query_failed)?;
        Ok(readable(&rows, "operations", operation))
    }

    /// The operation of this kind that is in progress about an object.
    pub(crate) async fn running_operation(
        &self,
        kind: OperationKind,
        subject: &str,
    ) -> Result<Option<OperationRow>> {
        let row = sqlx::query(
            "SELECT * FROM operations WHERE kind = $1 AND subject = $2 AND state = 'running' \
             ORDER BY created_ms, id LIMIT 1",
        )
        .bind(word(&kind)?)
        .bind(subject)
        .fetch_optional(&self.pool)
        .await
        .map_err(query_failed)?;
        row.as_ref().map(operation).transpose()
    }

    /// Takes over an operation from a controller that has ended. Returns whether the operation is the
    /// caller's now: another controller may have been faster.
    pub(crate) async fn take_over_operation(
        &self,
        operation: &OperationRow,
        owner: &str,
    ) -> Result<bool> {
        let mut change = self.change().await?;
        let taken = sqlx::query(
            "UPDATE operations SET owner = $1, updated_ms = $2 \
             WHERE id = $3 AND owner = $4 AND state = 'running'",
        )
        .bind(owner)
        .bind(stored(now_ms()))
        .bind(&operation.id)
        .bind(&operation.owner)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.commit().await?;
        Ok(taken.rows_affected() > 0)
    }
}

/// The operation of an idempotency key.
pub(super) const OF_KEY: &str =
    "SELECT * FROM operations WHERE tenant = $1 AND idempotency_key = $2";

impl Change<'_> {
    /// Records the end of an operation. An operation that has ended stays as it is.
    pub(super) async fn end_operation(&mut self, id: &str, end: &End) -> Result<()> {
        let (state, result, error) = match end {
            End::Succeeded(result) => (OperationState::Succeeded, Some(result.as_str()), None),
            End::Failed(error) => (OperationState::Failed, None, Some(error)),
            End::Unknown(error) => (OperationState::Failed, Some("{}"), Some(error)),
        };
        let ended = sqlx::query(
            "UPDATE operations SET state = $1, result = $2, error = $3, progress = NULL, \
             ended_ms = $4, updated_ms = $4 WHERE id = $5 AND state = 'running' RETURNING tenant",
        )
        .bind(word(&state)?)
        .bind(result)
        .bind(error.map(to_json).transpose()?)
        .bind(stored(now_ms()))
        .bind(id)
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        if let Some(row) = ended {
            let tenant = text(&row, "tenant")?;
            let kind = format!("operation.{}", word(&state)?);
            let detail = error.map_or("", |error| error.message.as_str());
            self.event(&kind, id, &tenant, detail).await?;
        }
        Ok(())
    }
}

/// The error of a repetition whose first answer had a secret, which is not kept.
pub(crate) fn told_once(subject: String) -> Error {
    let message = format!(
        "this request has made {subject} already, and its secret was in the first answer only"
    );
    Error::new(ErrorKind::Conflict, message).advise("make another one, with a new idempotency key")
}

/// A record, where it answers this request. One that made nothing does not.
pub(super) fn matching(row: &AnyRow, idempotency: &Idempotency) -> Result<Option<OperationRow>> {
    let hash = optional_text(row, "request_hash")?;
    if hash.as_deref() != Some(&idempotency.hash) {
        let message = "this idempotency key was used with another request before";
        return Err(Error::new(ErrorKind::IdempotencyMismatch, message)
            .advise("use a new key for each request, and the same key only to repeat one"));
    }
    let known = operation(row)?;
    let made_nothing = known.state == OperationState::Failed && known.result.is_none();
    Ok((!made_nothing).then_some(known))
}

/// The time and the id of the last operation of a page.
fn position(after: &str) -> Result<(i64, &str)> {
    let parts = after.split_once('-');
    let parsed = parts.and_then(|(time, id)| Some((time.parse().ok()?, id)));
    parsed.ok_or_else(|| {
        let message = "`after` must be the `next` of a page";
        Error::new(ErrorKind::InvalidRequest, message)
    })
}

fn operation(row: &AnyRow) -> Result<OperationRow> {
    let ended: Option<i64> = row.try_get("ended_ms").map_err(query_failed)?;
    Ok(OperationRow {
        id: text(row, "id")?,
        tenant: text(row, "tenant")?,
        actor: text(row, "actor")?,
        kind: from_word(&text(row, "kind")?)?,
        subject: text(row, "subject")?,
        state: from_word(&text(row, "state")?)?,
        request: text(row, "request")?,
        owner: text(row, "owner")?,
        created_ms: unsigned(row, "created_ms")?,
        updated_ms: unsigned(row, "updated_ms")?,
        ended_ms: ended.map(|time| time.max(0) as u64),
        progress: optional_text(row, "progress")?,
        result: optional_text(row, "result")?,
        error: optional_text(row, "error")?
            .as_deref()
            .map(parse)
            .transpose()?,
    })
}
