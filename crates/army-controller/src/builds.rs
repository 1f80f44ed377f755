//! Templates that are built from others: a clone, steps that are run in it, and a template of the
//! result.
//!
//! A build is an operation: it goes on when nobody listens to its progress any more. That of a
//! controller that has ended is completed where its host has the template whole; otherwise its VM is
//! ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_client::Connection;
use agent_proto::messages::Put;
use army_api::builds::{BuildEvent, BuildStep, BuildTemplate};
use army_api::exec::{CommandEvent, Ended, Exec, FilePath};
use army_api::operations::OperationKind;
use army_api::vms::{CreateVms, Vm};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::creation::check;
use crate::operations::{Outcome, Output, Requester, StartedOperation, detached};
use crate::store::reservations::Reservation;
use crate::store::template_names::{TemplateKey, TemplateName};
use crate::{Controller, CreatedVms, Error, ErrorKind, Result, guest};

/// The time limit of the steps, where the request has none.
const DEFAULT_LIMIT: Duration = Duration::from_secs(3600);
/// The number of events that may wait for a slow client, before the guest has to wait.
const AHEAD: usize = 4;
/// How long a client may take to read the progress of a build that has ended.
const LAST_PROGRESS: Duration = Duration::from_secs(10);
/// The label of a build's VM. Its value is the name of the new template.
const LABEL: &str = "build";
/// How much longer than its steps a build's VM may live, for the snapshot.
const GRACE: Duration = Duration::from_secs(600);

/// Receives the progress of a build.
pub type BuildListener = mpsc::Sender<BuildEvent>;

/// A build that was checked.
struct Build {
    template: TemplateKey,
    work: Vec<Work>,
    /// The time limit of all steps together.
    limit: Duration,
}

/// A step that was checked.
enum Work {
    Run(Exec),
    Write(Put, String),
}

impl Controller {
    /// Begins to build a template. The listener receives the steps and their output. The build
    /// continues when the listener is closed.
    pub async fn build(
        self: &Arc<Self>,
        requester: &Requester,
        request: BuildTemplate,
        listener: Option<BuildListener>,
    ) -> Result<StartedOperation> {
        let start = Instant::now();
        let limit = request.timeout_s.map_or(DEFAULT_LIMIT, Duration::from_secs);
        if limit.is_zero() {
            let message = "`timeout_s` must be at least 1";
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        let work = check_steps(request.steps.clone())?;
        // This is checked before an hour's work, and not only after it.
        let caller = requester.template_caller();
        let name = TemplateName::new(&request.template, caller, caller.own())?;
        let template = TemplateKey::new(name)?;
        let store_name = template.other_store_name();
        let record = serde_json::json!({ "from": request.from, "store_name": store_name });
        let (kind, subject) = (OperationKind::BuildTemplate, template.name.to_string());
        let new = self.new_request(requester, kind, &subject, &request, &record)?;
        if let Some(known) = self.repeated(&new).await? {
            return Ok(known);
        }
        let label = template.name.name.clone();
        let build = Build {
            template,
            work,
            limit,
        };
        let details = CreateVms {
            template: request.from,
            count: 1,
            labels: [(LABEL.to_owned(), label)].into(),
            host_labels: request.host_labels,
            environment: request.environment,
            ttl_s: Some(limit.saturating_add(GRACE).as_secs()),
            ..CreateVms::default()
        };
        check(&details)?;
        let (controller, requester) = (Arc::clone(self), requester.clone());
        detached(async move {
            let mut creation = controller.place_creation(&requester, details).await?;
            for host in creation.hosts() {
                let node = controller.node(host)?;
                let store_name = &build.template.store_name;
                controller.check_store_lacks(&node, store_name).await?;
            }
            let vms = creation.vms(Some(new.id()))?;
            let reservation = Reservation {
                vms: Some(&vms),
                new_template: Some(&build.template),
                ..Reservation::default()
            };
            if let Some(known) = controller.begin(&new, reservation).await? {
                return Ok(known);
            }
            let (id, builder) = (new.id().to_owned(), Arc::clone(&controller));
            Ok(controller.carry_out_and_record(id.clone(), async move {
                let created = creation.carry_out(None, start).await?;
                builder.build_in(&id, created, build, listener).await
            }))
        })
        .await
    }

    /// Builds a template in the VM that was created for it.
    async fn build_in(
        &self,
        operation: &str,
        mut created: CreatedVms,
        build: Build,
        listener: Option<BuildListener>,
    ) -> Outcome {
        let vm = created.vms.pop().ok_or_else(|| {
            let message = "the VM was created but is missing from the result";
            Error::new(ErrorKind::Internal, message)
        })?;
        let (progress, forwarded) = forward(listener);
        let built = async {
            self.run_steps(&vm, build.work, build.limit, &progress)
                .await?;
            self.take_snapshot(operation, &vm, &build.template, true)
                .await
        };
        let built = built.await;
        self.end_build_vm(&vm).await;
        drop(progress);
        // The client gets all of the progress before the result, unless it does not read it.
        let _ = tokio::time::timeout(LAST_PROGRESS, forwarded).await;
        Ok(Output::Template(Box::new(built?)))
    }

    /// Ends the VM of a build.
    pub(crate) async fn end_build_vm(&self, vm: &Vm) {
        if let Err(error) = self.destroy(vm).await {
            tracing::warn!(vm = vm.id, %error, "a build VM runs until its lifetime expires");
        }
    }

    async fn run_steps(
        &self,
        vm: &Vm,
        work: Vec<Work>,
        limit: Duration,
        listener: &BuildListener,
    ) -> Result<()> {
        let environment = self.store.environment(&vm.id).await?;
        // A limit beyond the range of the clock is no limit.
        let end = Instant::now().checked_add(limit);
        let count = work.len();
        for (number, work) in (1..).zip(work) {
            let sent = listener.send(BuildEvent::Step { number }).await;
            sent.map_err(|_| guest::client_disconnected())?;
            let left = end.map_or(limit, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                let message =
                    format!("the time limit was exceeded before step {number} of {count}");
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            let step = async {
                let connection = self.agent(vm, guest::with_grace(left)).await?;
                match work {
                    Work::Run(command) => {
                        let exec = guest::exec(command, environment.clone(), Some(left));
                        run(connection, exec, listener).await
                    }
                    Work::Write(put, text) => write(connection, put, &text).await,
                }
            };
            step.await.map_err(|mut error| {
                error.message = format!("step {number} of {count}: {}", error.message);
                error
            })?;
        }
        Ok(())
    }
}

/// A listener that receives the progress of a build for a client, and goes on to receive it when the
/// client has gone away.
fn forward(client: Option<BuildListener>) -> (BuildListener, JoinHandle<()>) {
    let (sender, mut receiver) = mpsc::channel(AHEAD);
    let forwarded = tokio::spawn(async move {
        let mut client = client;
        while let Some(event) = receiver.recv().await {
            client = match client {
                Some(listener) => listener.send(event).await.is_ok().then_some(listener),
                None => None,
            };
        }
    });
    (sender, forwarded)
}

/// Runs a command whose output goes to the listener.
async fn run(
    connection: Connection,
    exec: agent_proto::messages::Exec,
    listener: &BuildListener,
) -> Result<()> {
    let running = connection.exec(exec).await?;
    let ended = guest::follow(running, listener, |event| match event {
        CommandEvent::Output { stream, text, .. } => Some(BuildEvent::Output { stream, text }),
        // Nothing is lost of output that is read from the beginning.
        CommandEvent::Lost { .. } | CommandEvent::Ended(_) => None,
    })
    .await?;
    match ended {
        Ended {
            timed_out: true, ..
        } => Err(Error::new(
            ErrorKind::Timeout,
            "the time limit of the build was exceeded, and the command was killed",
        )),
        Ended {
            exit_code: Some(0), ..
        } => Ok(()),
        Ended {
            exit_code, signal, ..
        } => {
            let how = match (exit_code, signal) {
                (Some(code), _) => format!("exited with {code}"),
                (None, Some(signal)) => format!("was killed by signal {signal}"),
                (None, None) => "ended with an unknown status".to_owned(),
            };
            let message = format!("the command {how}");
            Err(Error::new(ErrorKind::Conflict, message))
        }
    }
}

/// Writes a file.
async fn write(connection: Connection, put: Put, text: &str) -> Result<()> {
    let mut upload = connection.put(put)?;
    upload.write(text.as_bytes()).await?;
    Ok(upload.finish().await?)
}

/// Checks the steps before anything is done.
fn check_steps(steps: Vec<BuildStep>) -> Result<Vec<Work>> {
    if steps.is_empty() {
        let message = "`steps` must have at least one step";
        return Err(Error::new(ErrorKind::InvalidRequest, message));
    }
    let check = |step| match step {
        BuildStep::Run {
            command,
            directory,
            user,
        } => {
            guest::check_command(&command)?;
            Ok(Work::Run(Exec {
                command,
                directory,
                user,
                ..Exec::default()
            }))
        }
        BuildStep::Write { path, text, mode } => Ok(Work::Write(
            guest::put(FilePath {
                path,
                mode,
                name: None,
            })?,
            text,
        )),
    };
    steps.into_iter().map(check).collect()
}
