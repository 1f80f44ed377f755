//! The command line: one file for each command.

mod build;
mod checkpoints;
mod context;
mod controller;
mod dev;
mod directories;
mod events;
mod exec;
mod files;
mod hosts;
mod keys;
mod moves;
mod node;
mod open_files;
mod operations;
mod output;
mod ports;
mod serve;
mod shell;
mod socket;
mod streams;
mod templates;
mod tenants;
mod vms;
mod webhooks;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use clone_cli::generate;

use context::Context;

/// Run clones for people: an API, a scheduler, a store and a node in one program.
///
/// `army dev` serves everything on this host; `army controller` and `army node` are for several
/// hosts. The other commands are clients: they send requests to the server at ARMY_URL, with the
/// key in ARMY_KEY.
#[derive(Parser)]
#[command(name = "army", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    context: context::Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve everything on this host: API, dashboard, store and VMs.
    Dev(dev::Args),
    /// Serve the API of several hosts.
    Controller(controller::Args),
    /// Run this host's VMs for a controller.
    Node(node::Args),
    /// Manage hosts: list, label, drain, undrain, evacuate, make join tokens, remove.
    #[command(subcommand)]
    Host(hosts::Command),
    /// Manage templates: list, build, register, share, tag, copy, export, import, standbys, remove.
    #[command(subcommand)]
    Template(templates::Command),
    /// Manage VMs: create, list, inspect, change, fork, migrate, pause, resume, checkpoint, rewind, balloon, figures, console, snapshot, destroy.
    #[command(subcommand)]
    Vm(vms::Command),
    /// Run a command in a VM, print its output, and exit with its exit status.
    Exec(exec::Args),
    /// Manage commands that were started with `exec --detach`: list, output, signal.
    #[command(subcommand, name = "command")]
    Detached(exec::DetachedCommand),
    /// Open a shell in a VM.
    Shell(shell::Args),
    /// Forward ports of this host to ports of a VM.
    PortForward(ports::Args),
    /// Copy a file into or out of a VM: one side is VM:PATH.
    Cp(files::CopyArgs),
    /// Manage operations, such as creates that nobody waits for: list, show, wait.
    #[command(subcommand)]
    Operation(operations::Command),
    /// Manage files in a VM: list, describe, make, remove, rename, archives, watch.
    #[command(subcommand)]
    File(directories::Command),
    /// Print events as they happen.
    Events(events::Args),
    /// Manage keys: list, create, remove.
    #[command(subcommand)]
    Key(keys::Command),
    /// Manage tenants and their quotas: list, show, change.
    #[command(subcommand)]
    Tenant(tenants::Command),
    /// Manage webhooks: list, create, remove.
    #[command(subcommand)]
    Webhook(webhooks::Command),
    /// Print the API's description in OpenAPI.
    Openapi,
    Completions(generate::CompletionsArgs),
    Man(generate::ManArgs),
}

/// How long threads may take to finish what they do when the program ends.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);

/// Parses the command line and runs its command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(cli));
            // A thread that hangs, such as one that waits for a VM's process, does not keep the
            // program from ending.
            runtime.shutdown_timeout(SHUTDOWN_LIMIT);
            result
        }
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<ExitCode> {
    let context = Context::new(cli.context);
    match cli.command {
        Command::Dev(args) => dev::run(args).await,
        Command::Controller(args) => controller::run(args).await,
        Command::Node(args) => node::run(args).await,
        Command::Host(command) => hosts::run(&context, command).await,
        Command::Template(command) => templates::run(&context, command).await,
        Command::Vm(command) => vms::run(&context, command).await,
        Command::Exec(args) => exec::run(&context, args).await,
        Command::Detached(command) => exec::command(&context, command).await,
        Command::Shell(args) => shell::run(&context, args).await,
        Command::PortForward(args) => ports::run(&context, args).await,
        Command::Cp(args) => files::copy(&context, args).await,
        Command::Operation(command) => operations::run(&context, command).await,
        Command::File(command) => directories::run(&context, command).await,
        Command::Events(args) => events::run(&context, args).await,
        Command::Key(command) => keys::run(&context, command).await,
        Command::Tenant(command) => tenants::run(&context, command).await,
        Command::Webhook(command) => webhooks::run(&context, command).await,
        Command::Openapi => {
            output::print(&crate::server::openapi().to_pretty_json()?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions(args) => Ok(generate::completions(&args, Cli::command())?),
        Command::Man(args) => Ok(generate::man(&args, Cli::command())?),
    }
}
