//! `clone template`: the templates in the store, and standbys of them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use clone_api::ApiError;
use clone_host::host_net::{self, HostNet};
use clone_host::launch::fork::Source;
use clone_host::launch::preflight;
use clone_host::launch::standby::{Standbys, train};
use clone_start::error::Result;
use clone_template::{Store, Template, bytes_to_flatten, flatten, upgrade};
use serde::Serialize;

use super::args::JailArgs;
use super::output::{human_bytes, table};
use super::signals::Signals;
use super::{Context, progress};

/// Manage the templates that clones are forked from.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ls(LsArgs),
    /// Show a template's manifest.
    Inspect(OneArgs),
    /// Verify the checksums of a template's content.
    Verify(OneArgs),
    Flatten(FlattenArgs),
    Upgrade(UpgradeArgs),
    Rm(RmArgs),
    Serve(ServeArgs),
}

/// List the templates in the store.
#[derive(Debug, clap::Args)]
struct LsArgs {}

#[derive(Debug, clap::Args)]
struct OneArgs {
    /// The template: a name in the store, or a path with a `/`.
    template: String,
}

/// Merge a template's layers into a new template with one memory layer and no disk layers.
#[derive(Debug, clap::Args)]
struct FlattenArgs {
    /// The template.
    template: String,
    /// The template to make.
    #[arg(long, short)]
    output: String,
}

/// Make a template of the current format from one that an older version made.
///
/// Older templates refer to the kernel of the host that they were made on, and contain none
/// themselves: their clones run, but end instead of rebooting. All other data is shared with the
/// old template, which can be removed afterwards.
#[derive(Debug, clap::Args)]
struct UpgradeArgs {
    /// The template.
    template: String,
    /// The kernel that clones reboot into: the one that the machine was booted with, or another.
    #[arg(long, short, value_name = "FILE")]
    kernel: PathBuf,
    /// The initial RAM disk that goes with the kernel.
    #[arg(long, short, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The template to make.
    #[arg(long, short)]
    output: String,
}

/// Remove templates that no VM uses.
#[derive(Debug, clap::Args)]
struct RmArgs {
    /// The templates.
    #[arg(required = true)]
    templates: Vec<String>,
}

/// Keep clones of a template ready, until interrupted.
///
/// A fork adopts one of these standbys in a fraction of the time that a new clone takes. Standbys
/// cost memory and processes while they wait, and end with this command.
#[derive(Debug, clap::Args)]
struct ServeArgs {
    /// The template.
    template: String,
    /// The number of standbys to keep ready.
    #[arg(long, short, default_value_t = 4)]
    standbys: u32,
    #[command(flatten)]
    jail: JailArgs,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let store = Store::from_env()?;
    match &args.command {
        Command::Ls(_) => ls(context, &store),
        Command::Inspect(args) => {
            let template = store.open(&args.template)?;
            context.output.print(template.manifest(), |manifest| {
                // The manifest is printed as JSON for people as well.
                serde_json::to_string_pretty(manifest).unwrap_or_default()
            });
            Ok(ExitCode::SUCCESS)
        }
        Command::Verify(args) => verify(context, &store.open(&args.template)?),
        Command::Flatten(args) => {
            let template = store.open(&args.template)?;
            let target = store.path(&args.output)?;
            let bar = progress::bytes(context, Some(bytes_to_flatten(&template)));
            bar.set_message("flattening");
            let flat = flatten(
                &context.runtime()?.verified(),
                &template,
                &target,
                |bytes| bar.inc(bytes),
            );
            bar.finish_and_clear();
            let flat = flat?;
            context
                .output
                .print(&flat.manifest().id, |_| flat.dir().display().to_string());
            Ok(ExitCode::SUCCESS)
        }
        Command::Upgrade(args) => {
            let template = store.open(&args.template)?;
            let target = store.path(&args.output)?;
            let (kernel, initrd) = (&args.kernel, args.initrd.as_deref());
            // The host boots the content of the file, which is refused if it is not a kernel.
            let kernel = preflight::boot_kernel(kernel)?;
            let verified = context.runtime()?.verified();
            let new = upgrade(&verified, &template, &target, &kernel, initrd)?;
            context
                .output
                .print(&new.manifest().id, |_| new.dir().display().to_string());
            Ok(ExitCode::SUCCESS)
        }
        Command::Rm(args) => {
            let runtime = context.runtime()?;
            for name in &args.templates {
                // A damaged template can be removed too; it was never verified.
                let id = store.open(name).ok().map(|it| it.manifest().id.clone());
                store.remove(name)?;
                if let Some(id) = id {
                    runtime.verified().forget(&id)?;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Serve(args) => serve(context, &store, args),
    }
}

#[derive(Serialize)]
struct Row {
    name: String,
    #[serde(flatten)]
    what: What,
}

#[derive(Serialize)]
#[serde(untagged)]
enum What {
    Template {
        id: String,
        memory_bytes: u64,
        data_bytes: u64,
        layers: usize,
        vcpus: u32,
        created_unix_ms: u64,
    },
    Broken {
        error: String,
    },
}

fn ls(context: &Context, store: &Store) -> Result<ExitCode> {
    let rows = store.list()?.into_iter().map(|(name, template)| Row {
        name,
        what: match template {
            Ok(template) => {
                let content = template.content();
                let data = content.memory.layers.iter().map(|layer| layer.data_bytes);
                What::Template {
                    id: template.manifest().id.clone(),
                    memory_bytes: content.memory.bytes,
                    data_bytes: data.sum(),
                    layers: content.memory.layers.len(),
                    vcpus: content.shape.vcpus,
                    created_unix_ms: content.created_unix_ms,
                }
            }
            Err(error) => What::Broken {
                error: error.message,
            },
        },
    });
    let rows: Vec<Row> = rows.collect();
    context.output.print(&rows, |rows| list_text(rows));
    Ok(ExitCode::SUCCESS)
}

fn list_text(rows: &[Row]) -> String {
    let header = ["NAME", "MEMORY", "DATA", "LAYERS", "VCPUS", "ID"];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        lines.push(match &row.what {
            What::Template {
                id,
                memory_bytes,
                data_bytes,
                layers,
                vcpus,
                ..
            } => vec![
                row.name.clone(),
                human_bytes(*memory_bytes),
                human_bytes(*data_bytes),
                layers.to_string(),
                vcpus.to_string(),
                id[..12.min(id.len())].to_owned(),
            ],
            What::Broken { error } => vec![row.name.clone(), error.clone()],
        });
    }
    table(&lines)
}

fn verify(context: &Context, template: &Template) -> Result<ExitCode> {
    let bar = progress::bytes(context, Some(template.bytes_to_verify()));
    bar.set_message("verifying");
    let verified = template.verify_and_note(&context.runtime()?.verified(), |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    verified?;
    context.output.print(&template.manifest().id, |id| {
        format!("{id}: all of it is as described")
    });
    Ok(ExitCode::SUCCESS)
}

/// The output of `clone template serve --json` each time that all standbys are ready.
#[derive(Serialize)]
struct Ready {
    ready: usize,
}

fn serve(context: &Context, store: &Store, args: &ServeArgs) -> Result<ExitCode> {
    let runtime = context.runtime()?.requiring(args.jail.required());
    let signals = Signals::take(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])
        .map_err(|error| ApiError::internal(&error))?;
    let template = store.open(&args.template)?;
    let id = template.manifest().id.clone();
    let name = Path::new(&args.template).file_name().unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    runtime.sweep()?;
    // Without the watch, rules that another program removes are restored with the next clone.
    let _network = HostNet::new(host_net::DEFAULT_DIR)
        .watch()
        .inspect_err(|error| tracing::warn!(%error, "the guests' packet filter is not watched"));
    train(&runtime, &template)?;
    let source = Source::template(&template, &runtime)?;
    let mut standbys = Standbys::new(&runtime, source, id)?;
    let mut reported = None;
    loop {
        let level = standbys.fill(args.standbys as usize)?;
        if reported != Some(level.ready) {
            reported = Some(level.ready);
            let ready = Ready { ready: level.ready };
            context
                .output
                .print(&ready, |ready| format!("{} of {name} ready", ready.ready));
        }
        // The standbys are also checked periodically, since one may have died.
        if standbys.wait(&signals, Duration::from_secs(30))? {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}
