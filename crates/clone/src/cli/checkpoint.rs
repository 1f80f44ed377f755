//! `clone checkpoint` and `clone rewind`: states of a running VM, and the way back to them.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clone_api::checkpoints::{
    CheckpointInfo, CheckpointList, CheckpointName, CheckpointTaken, Rewound,
};
use clone_host::checkpoint;
use clone_start::error::Result;
use serde::Serialize;

use super::Context;
use super::output::human_bytes;

/// Take a checkpoint of a running VM, list its checkpoints, or remove one.
///
/// A checkpoint is a state of the VM: its memory, CPUs, devices and disks. `clone rewind` sets the
/// VM back to it, as often as wanted. Checkpoints exist as long as the VM runs in its process, and
/// take room on the host's disk for what changed since the one before.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:\n  clone checkpoint web before-upgrade\n  clone checkpoint ls web\n  \
                  clone checkpoint rm web before-upgrade"
)]
pub(super) struct CheckpointArgs {
    /// The VM.
    #[arg(required = true)]
    vm: Option<String>,
    /// The name of the new checkpoint.
    #[arg(required = true)]
    checkpoint: Option<CheckpointName>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the checkpoints of a VM as a tree; `*` marks where the VM is.
    Ls {
        /// The VM.
        vm: String,
    },
    /// Remove a checkpoint. The VM and its other checkpoints stay as they are.
    Rm {
        /// The VM.
        vm: String,
        /// The checkpoint.
        checkpoint: CheckpointName,
    },
}

/// Set a VM back to one of its checkpoints.
///
/// Memory, CPUs, devices and disks are as they were, in the same VM with the same name and
/// addresses. What has happened since is lost, unless another checkpoint was taken of it.
/// Connections to the guest end, and commands that run in it by `clone exec`. The guest's clock is
/// set to the present time, and its random number generator is seeded anew.
#[derive(Debug, clap::Args)]
pub(super) struct RewindArgs {
    /// The VM.
    vm: String,
    /// The checkpoint.
    checkpoint: CheckpointName,
}

/// The output of `clone rewind --json`.
#[derive(Serialize)]
struct Back {
    #[serde(flatten)]
    rewound: Rewound,
    /// The time until the guest's clock was right.
    clock_us: Option<u64>,
}

pub(super) fn checkpoint(context: &Context, args: &CheckpointArgs) -> Result<ExitCode> {
    let runtime = context.runtime()?;
    match (&args.command, &args.vm, &args.checkpoint) {
        (Some(Command::Ls { vm }), ..) => {
            let list = checkpoint::list(&runtime.find(vm)?)?;
            context.output.print(&list, tree);
        }
        (Some(Command::Rm { vm, checkpoint }), ..) => {
            let left = checkpoint::remove(&runtime.find(vm)?, checkpoint)?;
            context.output.print(&left, |_| checkpoint.to_string());
        }
        (None, Some(vm), Some(name)) => {
            let taken = checkpoint::take(&runtime, &runtime.find(vm)?, name)?;
            context.output.print(&taken, taken_text);
        }
        // The parser requires both words where there is no subcommand.
        (None, ..) => {}
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn rewind(context: &Context, args: &RewindArgs) -> Result<ExitCode> {
    let vm = context.runtime()?.find(&args.vm)?;
    let back = checkpoint::rewind(&vm, &args.checkpoint)?;
    for notice in &back.notices {
        context
            .output
            .note(&format!("[clone: {}: {notice}]", args.vm));
    }
    let back = Back {
        rewound: back.rewound,
        clock_us: back.clock_us,
    };
    context.output.print(&back, |back| {
        format!(
            "{}: at {}; the guest was paused for {:.1} ms",
            args.vm,
            back.rewound.checkpoint,
            back.rewound.times.pause_us as f64 / 1000.0
        )
    });
    Ok(ExitCode::SUCCESS)
}

fn taken_text(taken: &CheckpointTaken) -> String {
    let CheckpointInfo {
        name,
        memory_bytes,
        disk_bytes,
        ..
    } = &taken.checkpoint;
    format!(
        "{name}: {} of memory, {} of disks; the guest was paused for {:.1} ms",
        human_bytes(*memory_bytes),
        human_bytes(*disk_bytes),
        taken.times.pause_us as f64 / 1000.0
    )
}

/// The checkpoints, each under the one that it was taken after.
fn tree(list: &CheckpointList) -> String {
    let mut children: BTreeMap<Option<&CheckpointName>, Vec<&CheckpointInfo>> = BTreeMap::new();
    for checkpoint in &list.checkpoints {
        let parent = checkpoint.parent.as_ref();
        children.entry(parent).or_default().push(checkpoint);
    }
    let mut text = String::new();
    let mut pending: Vec<(usize, &CheckpointInfo)> = Vec::new();
    let push = |pending: &mut Vec<_>, parent, depth| {
        let found = children.get(&parent).into_iter().flatten().rev();
        pending.extend(found.map(|child| (depth, *child)));
    };
    push(&mut pending, None, 0);
    while let Some((depth, checkpoint)) = pending.pop() {
        let mark = match list.present.as_ref() == Some(&checkpoint.name) {
            true => '*',
            false => ' ',
        };
        text += &format!(
            "{mark} {:indent$}{}  {}\n",
            "",
            checkpoint.name,
            human_bytes(checkpoint.memory_bytes + checkpoint.disk_bytes),
            indent = 2 * depth
        );
        push(&mut pending, Some(&checkpoint.name), depth + 1);
    }
    if !list.checkpoints.is_empty() {
        text += &format!("{} in all", human_bytes(list.used_bytes));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_shown_as_a_tree_with_the_present_one_marked() {
        let one = |name: &str, parent: Option<&str>| CheckpointInfo {
            name: name.parse().unwrap(),
            parent: parent.map(|parent| parent.parse().unwrap()),
            created_unix_ms: 0,
            memory_bytes: 1 << 20,
            disk_bytes: 0,
        };
        let list = CheckpointList {
            checkpoints: vec![
                one("a", None),
                one("b", Some("a")),
                one("c", Some("a")),
                one("d", Some("b")),
            ],
            present: Some("c".parse().unwrap()),
            used_bytes: 4 << 20,
        };
        let expected =
            "  a  1.0 MiB\n    b  1.0 MiB\n      d  1.0 MiB\n*   c  1.0 MiB\n4.0 MiB in all";
        assert_eq!(tree(&list), expected);
        assert_eq!(tree(&CheckpointList::default()), "");
    }
}
