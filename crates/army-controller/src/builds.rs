//! Templates that are built from others: a clone, steps that are run in it, and a template of the
//! result.
//!
//! A build lasts as long as somebody listens to its progress; then it is cancelled, and its VM ends.
//! A build whose controller dies leaves a VM that its host ends when the time of the build is over.

use std::time::{Duration, Instant};

use agent_client::Connection;
use agent_proto::messages::Put;
use army_api::builds::{BuildEvent, BuildStep, BuildTemplate};
use army_api::exec::{CommandEvent, Ended, Exec, FilePath};
use army_api::templates::Template;
use army_api::vms::{CreateVms, SnapshotVm, Vm};
use army_node_api::validate::check_template_name;
use tokio::sync::mpsc;

use crate::{Controller, Error, ErrorKind, Result, guest};

/// The time limit of the steps, where the request has none.
const DEFAULT_LIMIT: Duration = Duration::from_secs(3600);
/// The label of a build's VM. Its value is the name of the new template.
const LABEL: &str = "build";
/// How much longer than its steps a build's VM may live, for the snapshot.
const GRACE: Duration = Duration::from_secs(600);

/// Receives the progress of a build.
pub type BuildListener = mpsc::Sender<BuildEvent>;

/// A step that was checked.
enum Work {
    Run(Exec),
    Write(Put, String),
}

impl Controller {
    /// Builds a template. The listener receives the steps and their output; the result is for the
    /// caller to tell. Progress begins when there is a VM, so an error without any progress means
    /// that the build could not begin.
    pub async fn build(
        &self,
        tenant: &str,
        request: BuildTemplate,
        listener: &BuildListener,
    ) -> Result<Template> {
        let limit = request.timeout_s.map_or(DEFAULT_LIMIT, Duration::from_secs);
        if limit.is_zero() {
            let message = "`timeout_s` must be at least 1";
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        let work = check_steps(request.steps)?;
        // This is checked before an hour's work, and not only after it.
        check_template_name(&request.template)?;
        self.check_name_is_free(&request.template).await?;
        let details = CreateVms {
            template: request.from,
            count: 1,
            labels: [(LABEL.to_owned(), request.template.clone())].into(),
            host_labels: request.host_labels,
            environment: request.environment,
            ttl_s: Some(limit.saturating_add(GRACE).as_secs()),
            ..CreateVms::default()
        };
        let mut created = self.create(tenant, details, None).await?;
        let vm = created.vms.pop().ok_or_else(|| {
            let message = "the VM was created but is missing from the result";
            Error::new(ErrorKind::Internal, message)
        })?;
        let built = match self.run_steps(&vm, work, limit, listener).await {
            Ok(()) => {
                let snapshot = SnapshotVm {
                    template: request.template,
                    diff: true,
                };
                self.snapshot(&vm, snapshot).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = self.destroy(&vm).await {
            tracing::warn!(vm = vm.id, %error, "a build VM runs until its lifetime expires");
        }
        built
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
