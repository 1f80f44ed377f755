//! How operations begin, and what a repetition of a request gets.
//!
//! A repetition of a request whose operation is in progress waits for it. One of an operation that
//! has made something gets what that is now. One of an operation that has made nothing begins anew.

use std::sync::Arc;

use army_api::operations::OperationKind;
use serde::Serialize;

use super::{Outcome, Requester, StartedOperation, internal};
use crate::store::operations::{Idempotency, NewOperation};
use crate::store::reservations::{Begun, Reservation};
use crate::{Actor, Controller, Result, random};

/// A request for an operation.
pub(crate) struct NewRequest {
    new: NewOperation,
}

impl NewRequest {
    /// The operation as it will be recorded.
    pub(crate) fn operation(&self) -> &NewOperation {
        &self.new
    }

    /// The id that the operation will have.
    pub(crate) fn id(&self) -> &str {
        &self.new.id
    }
}

impl Controller {
    /// A request for an operation about `subject`. `content` is all that was requested, by which a
    /// repetition is recognized; `record` is the part of it that is kept, which has no secrets.
    pub(crate) fn new_request(
        &self,
        requester: &Requester,
        kind: OperationKind,
        subject: &str,
        content: &impl Serialize,
        record: &impl Serialize,
    ) -> Result<NewRequest> {
        let idempotency = match &requester.idempotency_key {
            Some(key) => {
                let content = serde_json::to_vec(&(kind, content)).map_err(internal)?;
                Some(Idempotency {
                    key: key.clone(),
                    hash: blake3::hash(&content).to_hex().to_string(),
                })
            }
            None => None,
        };
        Ok(NewRequest {
            new: NewOperation {
                id: random::hex::<8>()?,
                tenant: requester.tenant.clone(),
                actor: requester.key.clone(),
                kind,
                subject: subject.to_owned(),
                request: serde_json::to_string(record).map_err(internal)?,
                idempotency,
                owner: self.store.term().id.clone(),
            },
        })
    }

    /// The operation of an earlier request with the same idempotency key, where this request is its
    /// repetition.
    pub(crate) async fn repeated(&self, request: &NewRequest) -> Result<Option<StartedOperation>> {
        let Some(idempotency) = &request.new.idempotency else {
            return Ok(None);
        };
        let tenant = &request.new.tenant;
        let known = self.store.known_operation(tenant, idempotency).await?;
        Ok(known.map(|row| self.started(&row.id)))
    }

    /// Records an operation and what it reserves. Returns the operation of an earlier request where
    /// this one is its repetition; otherwise the caller carries the operation out.
    pub(crate) async fn begin(
        &self,
        request: &NewRequest,
        reservation: Reservation<'_>,
    ) -> Result<Option<StartedOperation>> {
        match self
            .store
            .begin_operation(&request.new, reservation)
            .await?
        {
            Begun::New => Ok(None),
            Begun::Known(row) => Ok(Some(self.started(&row.id))),
        }
    }

    /// Records an operation and carries it out, unless the request is a repetition. The end of the
    /// operation is recorded after the work.
    pub(crate) async fn begin_and_carry_out<F>(
        self: &Arc<Self>,
        request: NewRequest,
        reservation: Reservation<'_>,
        work: impl FnOnce(Arc<Self>) -> F,
    ) -> Result<StartedOperation>
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        match self.begin(&request, reservation).await? {
            Some(known) => Ok(known),
            None => {
                let work = work(Arc::clone(self));
                Ok(self.carry_out_and_record(request.new.id, work))
            }
        }
    }
}

/// Runs the beginning of an operation to its end, even where its client goes away in the middle of
/// it: what was recorded is also carried out.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let carried = tokio::spawn(Actor::current().carry(work)).await;
    carried.unwrap_or_else(|error| {
        let message = format!("a task failed: {error}");
        Err(crate::Error::new(crate::ErrorKind::Internal, message))
    })
}
