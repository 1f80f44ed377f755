//! `army operation`.

use std::process::ExitCode;

use anyhow::Result;
use army_api::client::{ClientError, segment};
use army_api::operations::{
    MAX_WAIT_S, Operation, OperationFilter, OperationPage, OperationState, Wait,
};
use clap::ValueEnum;

use super::context::Context;
use super::output::{note, table, word};

/// How long one request waits for an operation, in seconds. Proxies end requests that take long.
const ROUND_S: u64 = 60;

/// Manage operations: work that goes on whatever becomes of the client that requested it.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List operations, the newest first. Those that have ended are kept for a day.
    Ls {
        /// List only operations in this state.
        #[arg(long, value_enum)]
        state: Option<StateArg>,
        /// The maximum number of operations.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Show one operation, and what it has made.
    Show {
        /// The operation's id.
        id: String,
    },
    /// Wait until an operation has ended, and show it. It is an error if the operation failed.
    Wait {
        /// The operation's id.
        id: String,
        /// Wait for at most this number of seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = MAX_WAIT_S)]
        timeout: u64,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum StateArg {
    /// In progress.
    Running,
    /// Has made what was requested.
    Succeeded,
    /// Has made nothing.
    Failed,
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    match command {
        Command::Ls { state, limit } => {
            let state = state.map(|state| match state {
                StateArg::Running => OperationState::Running,
                StateArg::Succeeded => OperationState::Succeeded,
                StateArg::Failed => OperationState::Failed,
            });
            let operations = list(context, state, limit).await?;
            context.show(&operations, |operations| operations_table(operations))?;
        }
        Command::Show { id } => {
            let path = format!("/v1/operations/{}", segment(&id));
            let operation: Operation = context.client()?.get(&path, &()).await?;
            show(context, &operation)?;
        }
        Command::Wait { id, timeout } => {
            let operation = wait(context, &id, timeout).await?;
            show(context, &operation)?;
            return match (operation.state, operation.problem) {
                (OperationState::Succeeded, _) => Ok(ExitCode::SUCCESS),
                (_, Some(problem)) => Err(ClientError::Refused(problem).into()),
                _ => anyhow::bail!("the operation has not ended within {timeout} s"),
            };
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(
    context: &Context,
    state: Option<OperationState>,
    limit: u32,
) -> Result<Vec<Operation>> {
    let client = context.client()?;
    let mut filter = OperationFilter {
        state,
        ..OperationFilter::default()
    };
    let mut operations = Vec::new();
    while operations.len() < limit as usize {
        let missing = limit.saturating_sub(operations.len() as u32);
        filter.limit = Some(missing.min(1000));
        let page: OperationPage = client.get("/v1/operations", &filter).await?;
        operations.extend(page.operations);
        filter.after = page.next;
        if filter.after.is_none() {
            break;
        }
    }
    Ok(operations)
}

/// Waits for an operation, in as many requests as that takes.
async fn wait(context: &Context, id: &str, timeout: u64) -> Result<Operation> {
    let client = context.client()?;
    let path = format!("/v1/operations/{}", segment(id));
    let mut remaining = timeout;
    loop {
        let round = remaining.min(ROUND_S);
        let wait = Wait { wait: Some(round) };
        let operation: Operation = client.get(&path, &wait).await?;
        remaining -= round;
        if operation.state != OperationState::Running || remaining == 0 {
            return Ok(operation);
        }
    }
}

/// Shows an operation.
pub(super) fn show(context: &Context, operation: &Operation) -> Result<()> {
    context.show(operation, |it| operations_table(std::slice::from_ref(it)))?;
    if let Some(progress) = operation.progress.as_ref().filter(|_| !context.is_json()) {
        note(progress);
    }
    Ok(())
}

fn operations_table(operations: &[Operation]) -> String {
    let lines = operations.iter().map(|operation| {
        let problem = operation.problem.as_ref();
        vec![
            operation.id.clone(),
            word(&operation.kind),
            operation.subject.clone(),
            operation.tenant.clone(),
            word(&operation.state),
            problem.map_or_else(String::new, |it| it.detail.clone()),
        ]
    });
    let heads = ["OPERATION", "KIND", "SUBJECT", "TENANT", "STATE", "REASON"];
    table(&heads, lines.collect())
}
