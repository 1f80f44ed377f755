//! `army vm checkpoint` and `army vm rewind`.

use std::process::ExitCode;

use anyhow::Result;
use army_api::checkpoints::{Checkpoint, Checkpoints, Rewind, Rewound, TakeCheckpoint};
use army_api::client::segment;
use reqwest::Method;

use super::context::Context;
use super::output::{bytes, ms, note, table};

/// Take a checkpoint of a VM, list its checkpoints, or remove one.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct CheckpointArgs {
    /// The VM.
    #[arg(required = true)]
    vm: Option<String>,
    /// The name of the new checkpoint.
    #[arg(required = true)]
    checkpoint: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the checkpoints of a VM; `*` marks where the VM is.
    Ls {
        /// The VM.
        vm: String,
    },
    /// Remove a checkpoint. The VM and its other checkpoints stay as they are.
    Rm {
        /// The VM.
        vm: String,
        /// The checkpoint.
        checkpoint: String,
    },
}

/// `army vm rewind`.
#[derive(clap::Args)]
pub(super) struct RewindArgs {
    /// The VM.
    vm: String,
    /// The checkpoint.
    checkpoint: String,
}

pub(super) async fn checkpoint(context: &Context, args: CheckpointArgs) -> Result<ExitCode> {
    let client = context.client()?;
    match (args.command, args.vm, args.checkpoint) {
        (Some(Command::Ls { vm }), ..) => {
            let path = format!("/v1/vms/{}/checkpoints", segment(&vm));
            let list: Checkpoints = client.get(&path, &()).await?;
            context.show(&list, checkpoints_table)?;
        }
        (Some(Command::Rm { vm, checkpoint }), ..) => {
            let (vm, checkpoint) = (segment(&vm), segment(&checkpoint));
            let path = format!("/v1/vms/{vm}/checkpoints/{checkpoint}");
            let left: Checkpoints = client.send(Method::DELETE, &path, &()).await?;
            context.show(&left, checkpoints_table)?;
        }
        (None, Some(vm), Some(name)) => {
            let path = format!("/v1/vms/{}/checkpoints", segment(&vm));
            let request = TakeCheckpoint { name };
            let taken: Checkpoint = client.send(Method::POST, &path, &request).await?;
            context.show(&taken, |taken| {
                let (memory, disks) = (bytes(taken.memory_bytes), bytes(taken.disk_bytes));
                format!("{}: {memory} of memory, {disks} of disks", taken.name)
            })?;
        }
        // The parser requires both words where there is no subcommand.
        (None, ..) => {}
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn rewind(context: &Context, args: RewindArgs) -> Result<ExitCode> {
    let path = format!("/v1/vms/{}/rewind", segment(&args.vm));
    let request = Rewind {
        checkpoint: args.checkpoint,
    };
    let rewound: Rewound = context
        .client()?
        .send(Method::POST, &path, &request)
        .await?;
    context.show(&rewound, |rewound| {
        let pause = ms(rewound.pause_us);
        format!(
            "{}: at {}; the guest was paused for {pause}",
            args.vm, rewound.checkpoint
        )
    })?;
    for notice in &rewound.notices {
        note(&format!("{}: {notice}", args.vm));
    }
    Ok(ExitCode::SUCCESS)
}

fn checkpoints_table(list: &Checkpoints) -> String {
    let lines = list.checkpoints.iter().map(|checkpoint| {
        let mark = match list.present.as_deref() == Some(&checkpoint.name) {
            true => "*",
            false => "",
        };
        vec![
            mark.to_owned(),
            checkpoint.name.clone(),
            checkpoint.parent.clone().unwrap_or_default(),
            bytes(checkpoint.memory_bytes),
            bytes(checkpoint.disk_bytes),
        ]
    });
    table(
        &["AT", "CHECKPOINT", "PARENT", "MEMORY", "DISKS"],
        lines.collect(),
    )
}
