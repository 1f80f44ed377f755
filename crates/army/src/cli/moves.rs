//! `army vm migrate` and `army host evacuate`.

use std::process::ExitCode;

use anyhow::Result;
use army_api::client::{Begun, ClientError, segment};
use army_api::hosts::Host;
use army_api::moves::{MigrateVm, MovedVm};
use army_api::operations::{Operation, OperationState, Wait};
use clone_api::Bytes;
use serde::de::DeserializeOwned;

use super::context::Context;
use super::operations;
use super::output::{bytes, ms, note};

/// How often the progress of an operation is looked at, in seconds.
const ROUND_S: u64 = 2;

/// `army vm migrate`.
#[derive(clap::Args)]
pub(super) struct MigrateArgs {
    /// The VM.
    vm: String,
    /// The host to move it to; one is chosen as for a new VM by default.
    #[arg(long, value_name = "HOST")]
    to: Option<String>,
    /// Send at most this much in a second while the guest runs, as in 100M.
    #[arg(long, value_name = "SIZE")]
    bandwidth: Option<Bytes>,
    /// Do not wait for the VM: show the operation that moves it (army operation wait).
    #[arg(long)]
    no_wait: bool,
}

/// `army host evacuate`.
#[derive(clap::Args)]
pub(super) struct EvacuateArgs {
    /// The host.
    name: String,
    /// Do not wait for the VMs: show the operation that moves them (army operation wait).
    #[arg(long)]
    no_wait: bool,
}

pub(super) async fn migrate(context: &Context, args: MigrateArgs) -> Result<ExitCode> {
    let path = format!("/v1/vms/{}/migrate", segment(&args.vm));
    let request = MigrateVm {
        to: args.to,
        bytes_per_second: args.bandwidth.map(|Bytes(bytes)| bytes),
    };
    let begun: Begun<MovedVm> = context.client()?.begin(&path, &request, None, 0).await?;
    let moved = |operation: Operation| operation.moved;
    let Some(done) = finished(context, begun, args.no_wait, moved).await? else {
        return Ok(ExitCode::SUCCESS);
    };
    context.show(&done, |done| {
        let moved = &done.moved;
        format!(
            "{}: from {} to {}; {} were sent in {}, and the guest was paused for {}",
            done.vm.name,
            moved.from,
            moved.to,
            bytes(moved.bytes),
            ms(moved.total_us),
            ms(moved.pause_us)
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the host when it has no VMs; `None` where nobody waits for that.
pub(super) async fn evacuate(context: &Context, args: EvacuateArgs) -> Result<Option<Host>> {
    let path = format!("/v1/hosts/{}/evacuate", segment(&args.name));
    let begun: Begun<Host> = context.client()?.begin(&path, &(), None, 0).await?;
    finished(context, begun, args.no_wait, |operation| operation.host).await
}

/// What an operation has made, whose progress is shown until then. `None` where nobody waits.
async fn finished<T: DeserializeOwned>(
    context: &Context,
    begun: Begun<T>,
    no_wait: bool,
    output: impl Fn(Operation) -> Option<T>,
) -> Result<Option<T>> {
    let mut operation = match begun {
        Begun::Made(made) => return Ok(Some(made)),
        Begun::InProgress(operation) => *operation,
    };
    if no_wait {
        operations::show(context, &operation)?;
        return Ok(None);
    }
    let client = context.client()?;
    let path = format!("/v1/operations/{}", segment(&operation.id));
    let mut shown = None;
    while operation.state == OperationState::Running {
        if operation.progress != shown && !context.is_json() {
            if let Some(progress) = &operation.progress {
                note(progress);
            }
            shown.clone_from(&operation.progress);
        }
        let wait = Wait {
            wait: Some(ROUND_S),
        };
        operation = client.get(&path, &wait).await?;
    }
    if let Some(problem) = operation.problem {
        return Err(ClientError::Refused(problem).into());
    }
    match output(operation) {
        Some(made) => Ok(Some(made)),
        None => {
            anyhow::bail!("the operation has ended, and what it has made is not there any more")
        }
    }
}
