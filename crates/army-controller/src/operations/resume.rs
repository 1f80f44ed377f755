//! The operations of controllers that have ended. Another controller, or the same program after its
//! restart, takes them over: it completes what the hosts have, continues what can be continued, and
//! undoes the rest.

use std::sync::Arc;
use std::time::Duration;

use army_api::operations::{OperationKind, OperationState};
use army_api::vms::{Vm, VmState};
use army_node_api::requests::InspectTemplateRequest;
use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{
    HostRecord, LOOK, Outcome, Output, RegisterRecord, StoredRecord, internal, record_of_failures,
};
use crate::error::RETRY_S;
use crate::store::operations::{End, OperationRow};
use crate::store::template_names::TemplateKey;
use crate::{Actor, Controller, CreatedVms, CreationFailure, Error, ErrorKind, Result, deadlines};

/// How long a host elsewhere may go on with a request of a controller that has ended, before a
/// template that it does not have counts as not made.
const SETTLING: Duration = Duration::from_secs(60);
/// How often a host is asked meanwhile.
const ASK: Duration = Duration::from_secs(1);
/// How long to wait before an operation is resumed whose end could not be recorded.
const RETRY: Duration = Duration::from_secs(RETRY_S as u64);

impl Controller {
    /// Takes over the operations of controllers that have ended, and carries them out.
    pub(crate) async fn take_over_operations(self: &Arc<Self>) -> Result<()> {
        let own = &self.store.term().id;
        for row in self.store.abandoned_operations(own).await? {
            if !self.store.take_over_operation(&row, own).await? {
                continue;
            }
            tracing::info!(operation = row.id, kind = ?row.kind, "an operation is resumed");
            self.carry_out(row.id.clone(), Arc::clone(self).resume_operation(row));
        }
        Ok(())
    }

    /// Sees to it that an operation whose task has failed is recorded as ended, now or later.
    pub(super) fn ensure_end(self: &Arc<Self>, id: &str) -> BoxFuture<'static, ()> {
        let (controller, id) = (Arc::clone(self), id.to_owned());
        Box::pin(async move {
            let ended = |row: &OperationRow| row.state != OperationState::Running;
            let recorded = controller.store.operation(&id, None).await;
            if recorded.as_ref().is_ok_and(ended) {
                return;
            }
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(RETRY).await;
                    match controller.store.operation(&id, None).await {
                        Ok(row) if ended(&row) => return,
                        Ok(row) => {
                            controller.carry_out(id, Arc::clone(&controller).resume_operation(row));
                            return;
                        }
                        Err(error) if error.kind == ErrorKind::NotFound => return,
                        Err(error) => {
                            tracing::warn!(operation = id, %error, "cannot record its end");
                        }
                    }
                }
            });
        })
    }

    /// Brings an operation to its end that another task has begun. It may have come anywhere, and its
    /// host may be working on it.
    fn resume_operation(self: Arc<Self>, row: OperationRow) -> BoxFuture<'static, Outcome> {
        let actor = Actor::of(&row.actor);
        Box::pin(actor.carry(async move {
            match row.kind {
                OperationKind::CreateVms | OperationKind::ForkVm => {
                    return self.resume_creation(&row).await;
                }
                OperationKind::MigrateVm => return self.resume_move(&row).await,
                OperationKind::EvacuateHost => return self.evacuate(&row.id, &row.subject).await,
                OperationKind::RemoveTemplate => {
                    return self.remove_copies(&row.id, &key(&row).store_name).await;
                }
                OperationKind::StartCommand => {
                    let message = "it is not known whether the command was started, because the \
                                   server ended meanwhile";
                    let error = Error::new(ErrorKind::Internal, message)
                        .advise("list the VM's commands, and use a new idempotency key");
                    let end = End::Unknown(error.clone());
                    self.store.end_operation(&row.id, &end).await?;
                    return Err(error);
                }
                _ => {}
            }
            let outcome = self.resume_template_or_host(&row).await;
            if let Err(error) = &outcome
                && error.kind == ErrorKind::Internal
                && self.store.operation(&row.id, None).await.is_err()
            {
                // The database cannot be used: the operation is resumed later.
                return outcome;
            }
            self.store
                .end_operation(&row.id, &End::of(&outcome))
                .await?;
            outcome
        }))
    }

    async fn resume_template_or_host(self: &Arc<Self>, row: &OperationRow) -> Outcome {
        match row.kind {
            OperationKind::RegisterTemplate => {
                let RegisterRecord { host, standbys } = record(row)?;
                let new = key(row);
                if self.store.template(&new.store_name).await.is_err() {
                    return self.register_from(&row.id, &new, &host, standbys).await;
                }
                let set = self.set_standbys(&new.store_name, standbys).await;
                set.map(template)
            }
            OperationKind::CopyTemplate => {
                let HostRecord { host, .. } = record(row)?;
                self.copy_to(&key(row).store_name, &host).await
            }
            OperationKind::SnapshotVm | OperationKind::ImportTemplate => {
                let HostRecord { host, .. } = record(row)?;
                self.settle_template(row, &host).await
            }
            OperationKind::BuildTemplate => self.resume_build(row).await,
            OperationKind::DrainHost => self.drain(&row.subject, true).await,
            OperationKind::UndrainHost => self.drain(&row.subject, false).await,
            // These are ended where they are recorded, or above.
            OperationKind::CreateVms
            | OperationKind::ForkVm
            | OperationKind::RemoveTemplate
            | OperationKind::MigrateVm
            | OperationKind::EvacuateHost
            | OperationKind::CreateKey
            | OperationKind::CreateJoinToken
            | OperationKind::StartCommand => Err(interrupted()),
        }
    }

    /// Waits until all VMs of an operation were reported by their hosts, or are known to be lost.
    async fn resume_creation(&self, row: &OperationRow) -> Outcome {
        loop {
            let vms = self.store.vms_of_operation(&row.id).await?;
            if vms.iter().all(|vm| vm.state != VmState::Creating) {
                return self.end_creation(&row.id, vms).await;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn end_creation(&self, id: &str, vms: Vec<Vm>) -> Outcome {
        let (failed, vms): (Vec<Vm>, Vec<Vm>) =
            vms.into_iter().partition(|vm| vm.state == VmState::Failed);
        let failures = failed.into_iter().map(|vm| {
            let message = vm.reason.unwrap_or_else(|| "the VM is lost".to_owned());
            let error = Error::new(ErrorKind::HostUnavailable, message).retry_after(RETRY_S);
            CreationFailure {
                name: vm.name,
                error,
            }
        });
        let failures: Vec<CreationFailure> = failures.collect();
        let created = CreatedVms { vms, failures }.or_error();
        let end = match &created {
            Ok(created) => End::Succeeded(record_of_failures(&created.failures)?),
            Err(error) => End::Failed(error.clone()),
        };
        self.store.end_operation(id, &end).await?;
        created.map(Output::Vms)
    }

    /// Registers a template that a host has made whole for an operation, or records that it was not
    /// made.
    async fn settle_template(&self, row: &OperationRow, host: &str) -> Outcome {
        let new = key(row);
        if let Ok(known) = self.stored_template(&new.store_name).await {
            // The name was reserved, so nobody else has made it.
            return Ok(template(known));
        }
        let is_elsewhere = self.node(host)?.address().is_some();
        let end = match is_elsewhere {
            true => Instant::now() + SETTLING,
            // What the node of this process did has ended with it.
            false => Instant::now(),
        };
        loop {
            let node = self.node(host)?;
            let request = InspectTemplateRequest {
                template: new.store_name.clone(),
            };
            let inspected = node.inspect_template(request, deadlines::operation()).await;
            match inspected.map_err(Error::from) {
                Ok(facts) => {
                    let registered = self.register(&row.id, &new, host, 0, facts).await;
                    return registered.map(template);
                }
                Err(error) if error.kind == ErrorKind::NotFound => {
                    if Instant::now() >= end {
                        return Err(interrupted());
                    }
                }
                Err(error) => {
                    let progress = format!("waits for {host}: {}", error.message);
                    self.store.set_progress(&row.id, &progress).await?;
                }
            }
            tokio::time::sleep(ASK).await;
        }
    }

    /// Completes a build whose template its host has, and ends its VM.
    async fn resume_build(&self, row: &OperationRow) -> Outcome {
        let vms = self.store.vms_of_operation(&row.id).await?;
        let Some(vm) = vms.first() else {
            return Err(interrupted());
        };
        let built = self.settle_template(row, &vm.host).await;
        self.end_build_vm(vm).await;
        built
    }
}

fn template(template: army_api::templates::Template) -> Output {
    Output::Template(Box::new(template))
}

/// The names of the template that an operation is about.
fn key(row: &OperationRow) -> TemplateKey {
    // A record of a former release has no name on hosts.
    let StoredRecord { store_name } = record(row).unwrap_or_default();
    TemplateKey::recorded(&row.subject, store_name)
}

/// What is recorded of the request of an operation.
fn record<T: DeserializeOwned>(row: &OperationRow) -> Result<T> {
    serde_json::from_str(&row.request).map_err(internal)
}

fn interrupted() -> Error {
    let message = "the server that carried out this operation has ended before it was complete";
    Error::new(ErrorKind::Internal, message).advise("request it again")
}
