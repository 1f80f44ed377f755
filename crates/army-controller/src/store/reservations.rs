//! How operations begin: in the transaction that reserves what they need.

use army_node_api::time::now_ms;

use super::creation::NewVms;
use super::moves::NewMove;
use super::operations::{End, NewOperation, OF_KEY, OperationRow, matching, told_once};
use super::template_names::TemplateKey;
use super::{Change, Store, query_failed, stored, text, word};
use crate::{Error, ErrorKind, Result};

/// How long an operation that has ended is kept.
const KEPT_MS: u64 = 24 * 60 * 60 * 1000;
/// What an operation reserves when it begins. Where something of it cannot be reserved, the operation
/// does not begin.
#[derive(Default)]
pub(crate) struct Reservation<'a> {
    /// VMs, whose template must not be in removal.
    pub(crate) vms: Option<&'a NewVms<'a>>,
    /// A new template, whose names must be free.
    pub(crate) new_template: Option<&'a TemplateKey>,
    /// A template that is to be copied, as hosts store it, and must not be in removal.
    pub(crate) template: Option<&'a str>,
    /// A template that is to be removed, and must not be in use.
    pub(crate) removal: Option<&'a TemplateKey>,
    /// A VM that is to be moved to another host.
    pub(crate) departure: Option<NewMove<'a>>,
}

/// What is known of a request when its operation is about to begin.
#[derive(Debug)]
pub(crate) enum Begun {
    /// The operation was recorded, and is for the caller to carry out.
    New,
    /// An earlier request with the same idempotency key has begun this operation.
    Known(Box<OperationRow>),
}

impl Store {
    /// Records an operation that begins, and what it reserves, unless the request is known.
    ///
    /// # Errors
    /// [`ErrorKind::IdempotencyMismatch`] where the key came with another request, and those of what
    /// is reserved. Then nothing is recorded.
    pub(crate) async fn begin_operation(
        &self,
        new: &NewOperation,
        reservation: Reservation<'_>,
    ) -> Result<Begun> {
        let mut change = self.change().await?;
        if let Some(known) = change.known_operation(new).await? {
            change.commit().await?;
            return Ok(Begun::Known(Box::new(known)));
        }
        let reserves = reservation.new_template.map(|it| it.name.to_string());
        let reserves = reserves.as_deref();
        if !change.insert_operation(new, reserves).await? {
            // Another controller has begun the same request, or makes the same template.
            if let Some(known) = change.known_operation(new).await? {
                change.commit().await?;
                return Ok(Begun::Known(Box::new(known)));
            }
            return Err(in_the_making(reserves.unwrap_or_default()));
        }
        if let Some(template) = reservation.new_template {
            change.check_template_name_is_free(template).await?;
            change.check_template_quota(&template.name.owner).await?;
        }
        if let Some(name) = reservation.template {
            change.check_template_is_ready(name).await?;
        }
        if let Some(template) = reservation.removal {
            change.begin_removal(template).await?;
        }
        if let Some(departure) = reservation.departure {
            change.begin_move(departure).await?;
        }
        if let Some(vms) = reservation.vms {
            change.insert_vms(vms).await?;
        }
        let detail = format!("{} of {}", word(&new.kind)?, new.subject);
        change
            .event("operation.started", &new.id, &new.tenant, &detail)
            .await?;
        change.commit().await?;
        Ok(Begun::New)
    }
}

impl Change<'_> {
    /// The operation that an earlier request with the same key has begun. One that made nothing gives
    /// the key to this request.
    async fn known_operation(&mut self, new: &NewOperation) -> Result<Option<OperationRow>> {
        let Some(idempotency) = &new.idempotency else {
            return Ok(None);
        };
        let row = sqlx::query(OF_KEY)
            .bind(&new.tenant)
            .bind(&idempotency.key)
            .fetch_optional(self.connection())
            .await
            .map_err(query_failed)?;
        let Some(row) = row else {
            return Ok(None);
        };
        let known = matching(&row, idempotency)?;
        if known.is_none() {
            sqlx::query("UPDATE operations SET idempotency_key = NULL WHERE id = $1")
                .bind(text(&row, "id")?)
                .execute(self.connection())
                .await
                .map_err(query_failed)?;
        }
        Ok(known)
    }

    /// Returns false where an operation with the same idempotency key, or one that makes the same
    /// template, is recorded.
    async fn insert_operation(
        &mut self,
        new: &NewOperation,
        reserves: Option<&str>,
    ) -> Result<bool> {
        let now = now_ms();
        sqlx::query("DELETE FROM operations WHERE ended_ms < $1")
            .bind(stored(now.saturating_sub(KEPT_MS)))
            .execute(self.connection())
            .await
            .map_err(query_failed)?;
        let inserted = sqlx::query(
            "INSERT INTO operations (id, tenant, kind, subject, state, request, reserves, owner, \
             actor, created_ms, updated_ms, idempotency_key, request_hash) \
             VALUES ($1, $2, $3, $4, 'running', $5, $6, $7, $8, $9, $9, $10, $11) \
             ON CONFLICT DO NOTHING",
        )
        .bind(&new.id)
        .bind(&new.tenant)
        .bind(word(&new.kind)?)
        .bind(&new.subject)
        .bind(&new.request)
        .bind(reserves)
        .bind(&new.owner)
        .bind(&new.actor)
        .bind(stored(now))
        .bind(new.idempotency.as_ref().map(|it| it.key.as_str()))
        .bind(new.idempotency.as_ref().map(|it| it.hash.as_str()))
        .execute(self.connection())
        .await
        .map_err(query_failed)?;
        Ok(inserted.rows_affected() > 0)
    }

    /// Records an operation that is done in this transaction and has made `subject`.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the request is a repetition: what it has made is told once.
    pub(super) async fn record_made(&mut self, new: &NewOperation, subject: &str) -> Result<()> {
        let new = NewOperation {
            subject: subject.to_owned(),
            ..new.clone()
        };
        let known = self.known_operation(&new).await?;
        if known.is_some() || !self.insert_operation(&new, None).await? {
            return Err(told_once(known.map_or(new.subject, |it| it.subject)));
        }
        self.end_operation(&new.id, &End::Succeeded("{}".to_owned()))
            .await
    }

    /// Checks that no operation but `own` is making a template of this name.
    pub(super) async fn check_nobody_makes(&mut self, name: &str, own: Option<&str>) -> Result<()> {
        let row = sqlx::query(
            "SELECT id FROM operations WHERE reserves = $1 AND state = 'running' AND id <> $2",
        )
        .bind(name)
        .bind(own.unwrap_or_default())
        .fetch_optional(self.connection())
        .await
        .map_err(query_failed)?;
        match row {
            None => Ok(()),
            Some(_) => Err(in_the_making(name)),
        }
    }
}

/// The error where a template of this name is being made.
fn in_the_making(name: &str) -> Error {
    let message = format!("a template named `{name}` is being made");
    Error::new(ErrorKind::Conflict, message).advise("wait for it, or use another name")
}
