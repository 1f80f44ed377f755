//! `army exec`, `army command` and `army cp`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use army_api::client::segment;
use army_api::exec::{
    Command, CommandEvent, Cursor, Ended, Exec, ExecResult, OutputStream, SendSignal, StartCommand,
};
use army_api::streams::StartStream;
use futures_util::StreamExt;
use reqwest::Method;

use super::context::Context;
use super::output::{code_of, note, table};
use super::streams;

/// Run a command in a VM, print its output, and exit with its exit status.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The VM: its id, its name, or TENANT/NAME for another tenant's.
    vm: String,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<String>,
    /// An environment variable for the command, KEY=VALUE; can be given several times.
    #[arg(long = "env", short)]
    environment: Vec<String>,
    /// The working directory of the command.
    #[arg(long, short)]
    directory: Option<String>,
    /// The user to run the command as.
    #[arg(long, short)]
    user: Option<String>,
    /// Kill the command after this number of seconds: 60 by default and 3600 at most. A detached
    /// command, and one with input, has neither limit.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Send standard input to the command, as it comes.
    #[arg(long, short)]
    input: bool,
    /// Do not wait for the command; print its number, for `army command`.
    #[arg(long, conflicts_with = "input")]
    detach: bool,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let mut environment = std::collections::BTreeMap::new();
    for variable in &args.environment {
        let (key, value) = variable
            .split_once('=')
            .context("write a variable as KEY=VALUE")?;
        environment.insert(key.to_owned(), value.to_owned());
    }
    let timeout_ms = args.timeout.map(|seconds| seconds.saturating_mul(1000));
    if args.detach {
        let request = StartCommand {
            command: args.command,
            environment,
            directory: args.directory,
            user: args.user,
            timeout_ms,
        };
        let path = format!("/v1/vms/{}/commands", segment(&args.vm));
        let client = context.client()?;
        let started: Command = client.send(Method::POST, &path, &request).await?;
        context.show(&started, |it| it.id.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.input && !context.is_json() {
        let start = StartStream {
            command: args.command,
            environment,
            directory: args.directory,
            user: args.user,
            timeout_ms,
            input: true,
            acknowledge: false,
        };
        return streams::run(&context.client()?, &args.vm, start).await;
    }
    let stdin = match args.input {
        true => Some(std::io::read_to_string(std::io::stdin()).context("the input is no text")?),
        false => None,
    };
    let request = Exec {
        command: args.command,
        environment,
        directory: args.directory,
        user: args.user,
        stdin,
        timeout_ms,
    };
    let path = format!("/v1/vms/{}/exec", segment(&args.vm));
    let result: ExecResult = context
        .client()?
        .send(Method::POST, &path, &request)
        .await?;
    let code = code_of(result.exit_code, result.signal, result.timed_out);
    if context.is_json() {
        context.show(&result, |_| String::new())?;
        return Ok(ExitCode::from(code));
    }
    std::io::stdout().write_all(result.stdout.as_bytes())?;
    std::io::stderr().write_all(result.stderr.as_bytes())?;
    if result.lossy || result.omitted_bytes > 0 {
        bail!(
            "not all of the output could be shown: write it to a file and fetch that with `army cp`"
        );
    }
    Ok(ExitCode::from(code))
}

/// Manage commands that were started with `army exec --detach`.
#[derive(clap::Subcommand)]
pub(super) enum DetachedCommand {
    /// List the running commands, and the ended ones whose exit status has not been read.
    Ls {
        /// The VM.
        vm: String,
    },
    /// Print a command's output until it ends, and exit with its exit status.
    Output {
        /// The VM.
        vm: String,
        /// The command's number.
        id: u64,
        /// Skip this number of bytes of its standard output.
        #[arg(long, default_value_t = 0)]
        stdout: u64,
        /// Skip this number of bytes of its standard error output.
        #[arg(long, default_value_t = 0)]
        stderr: u64,
    },
    /// Send a signal to a command and the processes that it started.
    Signal {
        /// The VM.
        vm: String,
        /// The command's number.
        id: u64,
        /// The signal's number.
        #[arg(default_value_t = 15)]
        signal: i32,
    },
}

pub(super) async fn command(context: &Context, command: DetachedCommand) -> Result<ExitCode> {
    let client = context.client()?;
    match command {
        DetachedCommand::Ls { vm } => {
            let path = format!("/v1/vms/{}/commands", segment(&vm));
            let commands: Vec<Command> = client.get(&path, &()).await?;
            context.show(&commands, |commands| commands_table(commands))?;
        }
        DetachedCommand::Output {
            vm,
            id,
            stdout,
            stderr,
        } => {
            let path = format!("/v1/vms/{}/commands/{}/output", segment(&vm), id);
            let events = client.stream(&path, &Cursor { stdout, stderr }).await?;
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                let event: CommandEvent = event?;
                if context.is_json() {
                    context.show(&event, |_| String::new())?;
                } else {
                    print(&event)?;
                }
                if let CommandEvent::Ended(Ended {
                    exit_code,
                    signal,
                    timed_out,
                }) = event
                {
                    return Ok(ExitCode::from(code_of(exit_code, signal, timed_out)));
                }
            }
            bail!("the command's output was cut off: read on with --stdout and --stderr");
        }
        DetachedCommand::Signal { vm, id, signal } => {
            let path = format!("/v1/vms/{}/commands/{}/signal", segment(&vm), id);
            client.post(&path, &SendSignal { signal }).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print(event: &CommandEvent) -> Result<()> {
    match event {
        CommandEvent::Output { stream, text, .. } => {
            let mut out: Box<dyn Write> = match stream {
                OutputStream::Stdout => Box::new(std::io::stdout()),
                OutputStream::Stderr => Box::new(std::io::stderr()),
            };
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
        CommandEvent::Lost { bytes, .. } => note(&format!("{bytes} bytes of output were lost")),
        CommandEvent::Ended(_) => {}
    }
    Ok(())
}

fn commands_table(commands: &[Command]) -> String {
    let lines = commands.iter().map(|it| {
        let state = match it.ended {
            None => "runs".to_owned(),
            Some(end) => format!(
                "ended: {}",
                code_of(end.exit_code, end.signal, end.timed_out)
            ),
        };
        vec![
            it.id.to_string(),
            it.pid.to_string(),
            state,
            it.command.join(" "),
        ]
    });
    table(&["COMMAND", "PID", "STATE", "WHAT"], lines.collect())
}
