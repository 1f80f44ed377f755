//! Operations: work that is recorded before it begins, and goes on to its end whatever becomes of
//! the client that requested it.
//!
//! `begin` has what becomes of a request, which may be a repetition; this module has the work's task
//! and whoever waits for it; `resume` has the operations of controllers that have ended.

mod begin;
mod records;
mod resume;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use army_api::hosts::Host;
use army_api::moves::MovedVm;
use army_api::operations::{OperationFilter, OperationKind, OperationState};
use army_api::templates::Template;
use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::store::operations::{End, OperationRow, told_once};
use crate::store::template_names::TemplateCaller;
use crate::{Actor, Controller, CreatedVms, CreationFailure, Error, ErrorKind, Result};

pub(crate) use begin::detached;
pub(crate) use records::{HostRecord, RegisterRecord, StoredRecord};

/// How often an operation of another controller is looked at by whoever waits for it.
const LOOK: Duration = Duration::from_millis(250);

/// Who requests something, and how a repetition of the request is recognized.
#[derive(Debug, Clone, Default)]
pub struct Requester {
    /// The tenant of the caller.
    pub tenant: String,
    /// Whether the caller is an administrator, who sees the objects of all tenants.
    pub is_administrator: bool,
    /// The id of the caller's key.
    pub key: String,
    /// The idempotency key of the request, which the client has chosen.
    pub idempotency_key: Option<String>,
}

impl Requester {
    /// The caller, as templates are looked up for them.
    pub(crate) fn template_caller(&self) -> TemplateCaller<'_> {
        TemplateCaller {
            tenant: &self.tenant,
            is_administrator: self.is_administrator,
        }
    }
}

/// What an operation has made.
#[derive(Debug, Clone)]
pub enum Output {
    /// VMs.
    Vms(CreatedVms),
    /// A template.
    Template(Box<Template>),
    /// A host that was changed.
    Host(Box<Host>),
    /// A VM that was moved to another host.
    Moved(Box<MovedVm>),
    /// What the client needs of it, as JSON: a command that was started.
    Json(String),
    /// Nothing that is still there.
    Nothing,
}

/// The result of an operation that has ended.
pub type Outcome = Result<Output>;

/// An operation, as users see it.
#[derive(Debug, Clone)]
pub struct Operation {
    /// The unique id of the operation.
    pub id: String,
    /// The tenant of the caller.
    pub tenant: String,
    /// The id of the caller's key.
    pub actor: String,
    /// The kind of the operation.
    pub kind: OperationKind,
    /// The object that the operation is about.
    pub subject: String,
    /// The state of the operation.
    pub state: OperationState,
    /// When the operation was requested, in milliseconds since 1970.
    pub created_ms: u64,
    /// When the operation last changed, in milliseconds since 1970.
    pub updated_ms: u64,
    /// When the operation ended, in milliseconds since 1970.
    pub ended_ms: Option<u64>,
    /// What the operation is doing, for people.
    pub progress: Option<String>,
    /// What the operation has made, where it was asked for.
    pub output: Option<Output>,
    /// Why the operation failed.
    pub error: Option<Error>,
}

/// An operation that has begun, now or by an earlier request.
#[derive(Debug)]
pub struct StartedOperation {
    /// The id of the operation.
    pub id: String,
    progress: Progress,
}

#[derive(Debug)]
enum Progress {
    /// A task of this controller carries the operation out, and sends the outcome.
    Here(watch::Receiver<Option<Outcome>>),
    /// The database says what becomes of the operation.
    Recorded,
}

/// The operations that tasks of this controller carry out, by their ids.
#[derive(Default)]
pub(crate) struct Running(Mutex<HashMap<String, watch::Receiver<Option<Outcome>>>>);

impl Running {
    fn map(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<Option<Outcome>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Controller {
    /// One operation, with what it has made; only one of `tenant` where a tenant is given. Where it
    /// is in progress, its end is awaited for `limit`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub async fn operation(
        &self,
        id: &str,
        tenant: Option<&str>,
        limit: Duration,
    ) -> Result<Operation> {
        let mut row = self.store.operation(id, tenant).await?;
        if row.state == OperationState::Running && !limit.is_zero() {
            let started = self.started(&row.id);
            self.wait_for_end(started, Some(limit)).await;
            row = self.store.operation(id, tenant).await?;
        }
        let output = match row.state {
            OperationState::Succeeded => self.output(&row).await.ok(),
            OperationState::Running | OperationState::Failed => None,
        };
        // An administrator may have worked on a template that others of their tenant may not see.
        let output = match (output, tenant) {
            (Some(Output::Template(template)), Some(tenant)) => {
                let caller = TemplateCaller {
                    tenant,
                    is_administrator: false,
                };
                let visible = self.visible_template(*template, caller).await?;
                visible.map(|it| Output::Template(Box::new(it)))
            }
            (output, _) => output,
        };
        Ok(Operation {
            output,
            ..described(row)
        })
    }

    /// A page of operations without what they have made, the newest first, and where the next page
    /// begins; only those of `tenant` where a tenant is given.
    pub async fn operations(
        &self,
        filter: &OperationFilter,
        tenant: Option<&str>,
    ) -> Result<(Vec<Operation>, Option<String>)> {
        let (rows, next) = self.store.operations(filter, tenant).await?;
        Ok((rows.into_iter().map(described).collect(), next))
    }

    /// Waits until an operation has ended, and returns its outcome; `None` where it has not ended
    /// within `limit`.
    ///
    /// # Errors
    /// Why the operation failed.
    pub async fn outcome(
        &self,
        started: StartedOperation,
        limit: Option<Duration>,
    ) -> Result<Option<Output>> {
        let id = started.id.clone();
        match self.wait_for_end(started, limit).await {
            Waited::Outcome(outcome) => outcome.map(Some),
            Waited::Recorded => self.recorded_outcome(&id).await.map(Some),
            Waited::TimedOut => Ok(None),
        }
    }

    /// The outcome of an operation that has ended, computed from its rows.
    async fn recorded_outcome(&self, id: &str) -> Outcome {
        let row = self.store.operation(id, None).await?;
        match &row.error {
            Some(error) => Err(error.clone()),
            None => self.output(&row).await,
        }
    }

    async fn wait_for_end(&self, started: StartedOperation, limit: Option<Duration>) -> Waited {
        let wait = async {
            match started.progress {
                Progress::Here(mut outcome) => {
                    let sent = outcome.wait_for(Option::is_some).await;
                    match sent.ok().and_then(|outcome| outcome.clone()) {
                        Some(outcome) => Waited::Outcome(outcome),
                        None => self.wait_for_record(&started.id).await,
                    }
                }
                Progress::Recorded => self.wait_for_record(&started.id).await,
            }
        };
        match limit {
            None => wait.await,
            Some(limit) => tokio::time::timeout(limit, wait)
                .await
                .unwrap_or(Waited::TimedOut),
        }
    }

    /// Looks at an operation of another controller until it has ended: only the database knows.
    async fn wait_for_record(&self, id: &str) -> Waited {
        loop {
            match self.store.operation(id, None).await {
                Ok(row) if row.state == OperationState::Running => {}
                Ok(_) => return Waited::Recorded,
                Err(error) => return Waited::Outcome(Err(error)),
            }
            tokio::time::sleep_until(Instant::now() + LOOK).await;
        }
    }

    /// An operation that is known to have begun.
    pub(crate) fn started(&self, id: &str) -> StartedOperation {
        let here = self.operations.map().get(id).cloned();
        StartedOperation {
            id: id.to_owned(),
            progress: here.map_or(Progress::Recorded, Progress::Here),
        }
    }

    /// Carries out an operation in a task of its own. The work records its end, together with what it
    /// has made. Where it could not, the operation is resumed like that of a controller that has
    /// ended.
    pub(crate) fn carry_out(
        self: &Arc<Self>,
        id: String,
        work: impl Future<Output = Outcome> + Send + 'static,
    ) -> StartedOperation {
        let (sender, receiver) = watch::channel(None);
        self.operations.map().insert(id.clone(), receiver.clone());
        let started = StartedOperation {
            id: id.clone(),
            progress: Progress::Here(receiver),
        };
        let controller = Arc::clone(self);
        let carried = async move {
            let outcome = AssertUnwindSafe(work).catch_unwind().await;
            let outcome = outcome.unwrap_or_else(|_| {
                let message = "the task of the operation has failed";
                Err(Error::new(ErrorKind::Internal, message))
            });
            if outcome.is_err() {
                controller.ensure_end(&id).await;
            }
            controller.operations.map().remove(&id);
            sender.send_replace(Some(outcome));
        };
        tokio::spawn(Actor::current().carry(carried));
        started
    }

    /// Carries out an operation whose end is recorded after its work.
    pub(crate) fn carry_out_and_record(
        self: &Arc<Self>,
        id: String,
        work: impl Future<Output = Outcome> + Send + 'static,
    ) -> StartedOperation {
        let (controller, operation) = (Arc::clone(self), id.clone());
        self.carry_out(id, async move {
            let outcome = work.await;
            let end = End::of(&outcome);
            controller.store.end_operation(&operation, &end).await?;
            outcome
        })
    }

    /// What an operation that has succeeded has made, as it is now.
    async fn output(&self, row: &OperationRow) -> Outcome {
        match row.kind {
            OperationKind::CreateVms | OperationKind::ForkVm => {
                let result = row.result.as_deref().unwrap_or("{}");
                let failures = failures(result)?;
                let vms = self.store.vms_of_operation(&row.id).await?.into_iter();
                let failed = |name: &str| failures.iter().any(|it| it.name == name);
                Ok(Output::Vms(CreatedVms {
                    vms: vms.filter(|vm| !failed(&vm.name)).collect(),
                    failures,
                }))
            }
            OperationKind::SnapshotVm
            | OperationKind::RegisterTemplate
            | OperationKind::CopyTemplate
            | OperationKind::ImportTemplate
            | OperationKind::BuildTemplate => {
                let template = self.recorded_template(&row.subject).await?;
                Ok(Output::Template(Box::new(template)))
            }
            OperationKind::MigrateVm => self.recorded_move(row).await,
            OperationKind::DrainHost | OperationKind::UndrainHost | OperationKind::EvacuateHost => {
                Ok(Output::Host(Box::new(self.host(&row.subject).await?)))
            }
            OperationKind::StartCommand => Ok(Output::Json(row.result.clone().unwrap_or_default())),
            OperationKind::CreateKey | OperationKind::CreateJoinToken => {
                Err(told_once(row.subject.clone()))
            }
            OperationKind::RemoveTemplate => Ok(Output::Nothing),
        }
    }
}

enum Waited {
    /// The outcome, as the task has sent it.
    Outcome(Outcome),
    /// The operation has ended, as the database says.
    Recorded,
    /// The operation has not ended within the limit.
    TimedOut,
}

fn described(row: OperationRow) -> Operation {
    Operation {
        id: row.id,
        tenant: row.tenant,
        actor: row.actor,
        kind: row.kind,
        subject: row.subject,
        state: row.state,
        created_ms: row.created_ms,
        updated_ms: row.updated_ms,
        ended_ms: row.ended_ms,
        progress: row.progress,
        output: None,
        error: row.error,
    }
}

/// The failures of an operation that has created other VMs, as its record holds them.
fn failures(result: &str) -> Result<Vec<CreationFailure>> {
    #[derive(serde::Deserialize)]
    struct Recorded {
        #[serde(default)]
        failures: Vec<CreationFailure>,
    }
    let recorded: Recorded = serde_json::from_str(result).map_err(internal)?;
    Ok(recorded.failures)
}

/// The record of the failures of an operation that has created other VMs.
pub(crate) fn record_of_failures(failures: &[CreationFailure]) -> Result<String> {
    let recorded = serde_json::json!({ "failures": failures });
    serde_json::to_string(&recorded).map_err(internal)
}

pub(crate) fn internal(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Internal, error.to_string())
}
