//! Starting background commands in guests.

use std::sync::Arc;
use std::time::Duration;

use army_api::exec::{Command, StartCommand};
use army_api::operations::OperationKind;
use army_api::vms::Vm;

use crate::operations::{Output, Requester, detached, internal};
use crate::store::operations::End;
use crate::store::reservations::Reservation;
use crate::{Controller, Error, ErrorKind, Result, guest};

/// How long the agent may take to start a command.
const LIMIT: Duration = Duration::from_secs(20);

impl Controller {
    /// Starts a command in a guest without waiting for its end. With an idempotency key, that is an
    /// operation: a repetition returns the command, which may have ended.
    pub async fn start_command(
        self: &Arc<Self>,
        requester: &Requester,
        vm: &Vm,
        request: StartCommand,
    ) -> Result<Command> {
        guest::check_command(&request.command)?;
        if requester.idempotency_key.is_none() {
            return self.start(vm, request).await;
        }
        let kind = OperationKind::StartCommand;
        let new = self.new_request(requester, kind, &vm.id, &(&vm.id, &request), &())?;
        let (controller, vm) = (Arc::clone(self), vm.clone());
        let started = detached(async move {
            if let Some(known) = controller.begin(&new, Reservation::default()).await? {
                return Ok(known);
            }
            let (id, starter) = (new.id().to_owned(), Arc::clone(&controller));
            Ok(controller.carry_out(id.clone(), async move {
                let started = starter.start(&vm, request).await;
                let started = started.and_then(|it| serde_json::to_string(&it).map_err(internal));
                let end = match &started {
                    Ok(command) => End::Succeeded(command.clone()),
                    // The guest may have started it.
                    Err(error) if error.kind == ErrorKind::Timeout => End::Unknown(error.clone()),
                    Err(error) => End::Failed(error.clone()),
                };
                starter.store.end_operation(&id, &end).await?;
                started.map(Output::Json)
            }))
        });
        match self.outcome(started.await?, None).await? {
            Some(Output::Json(command)) => serde_json::from_str(&command).map_err(internal),
            _ => {
                let message = "the operation has ended without a command";
                Err(Error::new(ErrorKind::Internal, message))
            }
        }
    }

    async fn start(&self, vm: &Vm, request: StartCommand) -> Result<Command> {
        let environment = self.environment(vm).await?;
        let connection = self.agent(vm, LIMIT).await?;
        let command = request.command.clone();
        let limit = request.timeout_ms.map(Duration::from_millis);
        let mut exec = guest::exec(request.into(), environment, limit);
        exec.detached = true;
        let running = connection.exec(exec).await?;
        let started = running.started();
        Ok(Command {
            id: started.id,
            pid: started.pid,
            command,
            ended: None,
        })
    }
}
