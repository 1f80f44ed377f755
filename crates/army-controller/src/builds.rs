//! Templates built of others: a clone, what is done in it, and a template of what it is then.
//!
//! A build is its listener's: where nobody listens any more it ends, and its VM with it. One whose
//! server dies leaves a VM that its host ends when the build's time is over.

use std::time::{Duration, Instant};

use agent_proto::client::Connection;
use agent_proto::messages::Put;
use army_api::builds::{BuildEvent, BuildStep, BuildTemplate};
use army_api::exec::{CommandEvent, Ended, Exec, FilePath};
use army_api::templates::Template;
use army_api::vms::{CreateVms, SnapshotVm, Vm};
use army_api::{Problem, ProblemKind};
use tokio::sync::mpsc;

use super::Controller;
use crate::guest;
use crate::store::Result;
use army_node_api::blocking;
use army_node_api::{check_template_name, of_agent};

/// How long the steps may take, where the client does not say.
const DEFAULT_LIMIT: Duration = Duration::from_secs(3600);
/// What a builder is called by its label, whose value is the template's name.
const LABEL: &str = "build";
/// How much longer its VM lives: for the snapshot.
const GRACE: Duration = Duration::from_secs(600);

/// Where a build's events go.
pub type Listener = mpsc::Sender<BuildEvent>;

/// A step that can be told to an agent, as the request has it.
enum Work {
    Run(Exec),
    Write(Put, String),
}

impl Controller {
    /// Builds a template. The listener hears how it goes, and last how it went.
    pub async fn build(&self, tenant: &str, asked: BuildTemplate, listener: &Listener) {
        let last = match self.try_build(tenant, asked, listener).await {
            Ok(template) => BuildEvent::Built { template },
            Err(problem) => BuildEvent::Failed { problem },
        };
        // Who left does not want to know.
        let _ = listener.send(last).await;
    }

    async fn try_build(
        &self,
        tenant: &str,
        asked: BuildTemplate,
        listener: &Listener,
    ) -> Result<Template> {
        let limit = asked.timeout_s.map_or(DEFAULT_LIMIT, Duration::from_secs);
        if limit.is_zero() {
            let detail = "`timeout_s` must be at least 1";
            return Err(Problem::new(ProblemKind::InvalidRequest, detail));
        }
        let work = work(asked.steps)?;
        self.check_new(&asked.template).await?;
        let details = CreateVms {
            template: asked.from,
            count: 1,
            labels: [(LABEL.to_owned(), asked.template.clone())].into(),
            host_labels: asked.host_labels,
            environment: asked.environment,
            ttl_s: Some(limit.saturating_add(GRACE).as_secs()),
            ..CreateVms::default()
        };
        // Events begin when there is a VM: what is wrong before that is the answer to the request.
        let mut created = self.create(tenant, details, None).await?;
        let vm = created.vms.pop().ok_or_else(|| {
            let detail = "the VM was created but is missing from the result";
            Problem::new(ProblemKind::Internal, detail)
        })?;
        let built = self.build_in(&vm, work, limit, listener).await;
        let built = match built {
            Ok(()) => {
                let asked = SnapshotVm {
                    template: asked.template,
                    diff: true,
                };
                self.snapshot(&vm, asked).await
            }
            Err(problem) => Err(problem),
        };
        if let Err(problem) = self.destroy(&vm).await {
            tracing::warn!(vm = vm.id, %problem, "a build VM runs until its lifetime expires");
        }
        built
    }

    /// Whether a template can be called so: before an hour's work, and not after it.
    async fn check_new(&self, name: &str) -> Result<()> {
        check_template_name(name)?;
        match self.store.template_or_tag(name).await {
            Ok(_) => {
                let detail = format!("a template or a tag named `{name}` already exists");
                Err(Problem::new(ProblemKind::Conflict, detail))
            }
            Err(problem) if problem.kind == ProblemKind::NotFound => Ok(()),
            Err(problem) => Err(problem),
        }
    }

    async fn build_in(
        &self,
        vm: &Vm,
        work: Vec<Work>,
        limit: Duration,
        listener: &Listener,
    ) -> Result<()> {
        let environment = self.store.environment(&vm.id).await?;
        // A limit beyond what the clock can tell is none.
        let end = Instant::now().checked_add(limit);
        let count = work.len();
        for (number, work) in (1..).zip(work) {
            let heard = listener.send(BuildEvent::Step { number }).await;
            heard.map_err(|_| guest::left())?;
            let left = end.map_or(limit, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                let detail = format!("the time limit was exceeded before step {number} of {count}");
                return Err(Problem::new(ProblemKind::Timeout, detail));
            }
            let node = self.node_of(vm)?;
            let (id, listener, environment) =
                (vm.id.clone(), listener.clone(), environment.clone());
            let done = blocking(move || {
                let (connection, _in_use) = guest::connect(&node, &id, left)?;
                match work {
                    Work::Run(asked) => {
                        let exec = guest::exec(asked, environment, Some(left));
                        run(connection, exec, &listener)
                    }
                    Work::Write(put, text) => connection
                        .put(put, &mut text.as_bytes())
                        .map_err(|error| of_agent(&error)),
                }
            });
            done.await.map_err(|mut problem| {
                problem.detail = format!("step {number} of {count}: {}", problem.detail);
                problem
            })?;
        }
        Ok(())
    }
}

/// Runs a command whose output goes to the listener.
fn run(
    connection: Connection,
    exec: agent_proto::messages::Exec,
    listener: &Listener,
) -> Result<()> {
    let running = connection.exec(exec).map_err(|error| of_agent(&error))?;
    let ended = guest::follow(running, listener, |event| match event {
        CommandEvent::Output { stream, text, .. } => Some(BuildEvent::Output { stream, text }),
        // Nothing is lost of what is heard from the beginning.
        CommandEvent::Lost { .. } | CommandEvent::Ended(_) => None,
    })?;
    match ended {
        Ended {
            timed_out: true, ..
        } => Err(Problem::new(
            ProblemKind::Timeout,
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
            let detail = format!("the command {how}");
            Err(Problem::new(ProblemKind::Conflict, detail))
        }
    }
}

/// Steps as they can be told, or what is wrong with one before anything is done.
fn work(steps: Vec<BuildStep>) -> Result<Vec<Work>> {
    if steps.is_empty() {
        let detail = "`steps` must have at least one step";
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    let told = |step| match step {
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
    steps.into_iter().map(told).collect()
}
