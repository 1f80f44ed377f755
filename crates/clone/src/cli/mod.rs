//! The command line: one file per command.
//!
//! A command is a client of the VMs' sockets and of the runtime directory. It prints text for
//! people, or JSON with `--json`. Errors and their advice go to standard error and determine the
//! exit code ([`exit`]).

mod agent;
mod args;
mod attach;
mod balloon;
mod checkpoint;
mod cp;
mod exec;
mod exit;
mod fork;
mod image;
mod logs;
mod ls;
mod migrate;
mod options;
mod output;
mod power;
mod progress;
mod run;
mod share;
mod signals;
mod snapshot;
mod stat;
mod template;
mod terminal;
mod tty_console;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clone_host::runtime::Runtime;
use clone_start::error::Result;

use output::Output;

/// Virtual machines that start fast and fork faster.
#[derive(Debug, Parser)]
#[command(
    name = "clone",
    version,
    after_help = exit::HELP,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
struct Cli {
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    // It is boxed because it has many more flags than the others.
    Run(Box<run::Args>),
    Ls(ls::Args),
    Stat(stat::Args),
    Attach(attach::Args),
    Logs(logs::Args),
    Exec(exec::ExecArgs),
    Shell(exec::ShellArgs),
    Cp(cp::Args),
    Pause(power::PauseArgs),
    Suspend(power::SuspendArgs),
    Resume(power::ResumeArgs),
    // It is boxed as `Run` is.
    Migrate(Box<migrate::Args>),
    Stop(power::StopArgs),
    Kill(power::KillArgs),
    Rm(power::RmArgs),
    Balloon(balloon::Args),
    Checkpoint(checkpoint::CheckpointArgs),
    Rewind(checkpoint::RewindArgs),
    Share(share::ShareArgs),
    Snapshot(snapshot::Args),
    Fork(fork::Args),
    Template(template::Args),
    Image(image::Args),
    Completions(clone_cli::generate::CompletionsArgs),
    Man(clone_cli::generate::ManArgs),
}

/// The context of a command besides its own arguments.
struct Context {
    output: Output,
}

impl Context {
    fn runtime(&self) -> Result<Runtime> {
        Runtime::from_env()
    }
}

/// Runs the `clone` command.
pub(super) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are "errors" that go to standard output with code 0.
            let code = if error.use_stderr() { exit::USAGE } else { 0 };
            return match error.print() {
                Ok(()) => ExitCode::from(code),
                Err(_) => ExitCode::from(exit::FAILURE),
            };
        }
    };
    clone_cli::log::start();
    let context = Context {
        output: Output::new(cli.json),
    };
    match dispatch(&context, cli.command) {
        Ok(code) => code,
        Err(error) => {
            context.output.error(&error);
            ExitCode::from(exit::code_of(&error))
        }
    }
}

fn dispatch(context: &Context, command: Command) -> Result<ExitCode> {
    match command {
        Command::Run(args) => run::run(context, *args),
        Command::Ls(args) => ls::run(context, &args),
        Command::Stat(args) => stat::run(context, &args),
        Command::Attach(args) => attach::run(context, &args),
        Command::Logs(args) => logs::run(context, &args),
        Command::Exec(args) => exec::exec(context, args),
        Command::Shell(args) => exec::shell(context, args),
        Command::Cp(args) => cp::run(context, &args),
        Command::Pause(args) => power::pause(context, &args),
        Command::Suspend(args) => power::suspend(context, &args),
        Command::Resume(args) => power::resume(context, &args),
        Command::Migrate(args) => migrate::run(context, &args),
        Command::Stop(args) => power::stop(context, &args),
        Command::Kill(args) => power::kill(context, &args),
        Command::Rm(args) => power::rm(context, &args),
        Command::Balloon(args) => balloon::run(context, &args),
        Command::Checkpoint(args) => checkpoint::checkpoint(context, &args),
        Command::Rewind(args) => checkpoint::rewind(context, &args),
        Command::Share(args) => share::run(context, &args),
        Command::Snapshot(args) => snapshot::run(context, &args),
        Command::Fork(args) => fork::run(context, &args),
        Command::Template(args) => template::run(context, &args),
        Command::Image(args) => image::run(context, args),
        Command::Completions(args) => clone_cli::generate::completions(&args, Cli::command()),
        Command::Man(args) => clone_cli::generate::man(&args, Cli::command()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed_and_every_part_of_it_explained() {
        let mut command = Cli::command();
        command.clone().debug_assert();
        command.build();
        for sub in command.get_subcommands() {
            assert!(sub.get_about().is_some(), "{}", sub.get_name());
            for arg in sub.get_arguments() {
                let explained = arg.get_help().is_some() || arg.get_long_help().is_some();
                assert!(explained, "{} {}", sub.get_name(), arg.get_id());
            }
        }
    }
}
