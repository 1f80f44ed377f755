//! `clone exec` and `clone shell`: commands in a guest.

use std::io::IsTerminal;
use std::process::ExitCode;

use agent_proto::client::{ByteLimit, ClientError};
use agent_proto::messages::{ErrorCode as AgentCode, Exec, Exited};
use clone_api::ApiError;
use clone_start::error::Result;
use serde::Serialize;

use super::Context;
use super::agent::{self, Streams, Wait};

/// `clone` itself failed, not the command.
const CLONE_FAILED: u8 = 125;
/// The command exists and cannot be run.
const CANNOT_RUN: u8 = 126;
/// There is no such command.
const NO_COMMAND: u8 = 127;
/// The command ran longer than it may.
const TIMED_OUT: u8 = 124;
/// The most output that is collected for JSON; streamed output has no limit.
const MAX_OUTPUT: ByteLimit = ByteLimit::new(64 << 20);

/// Run a command in a guest, and exit with its exit code.
///
/// In the guest of a container image, the image's command, environment, user and working directory
/// are the defaults.
///
/// The exit code is 128 plus the signal's number for a command that was ended by a signal, and 124
/// for one that ran too long; 125 means that clone itself failed, 126 that the command cannot be
/// run, and 127 that there is no such command.
///
/// `clone exec` ends when the command ends, even if the command left processes in the background.
/// Signals are passed on to the command; a third SIGINT or SIGTERM ends the wait for it. A command
/// whose `clone exec` is killed keeps running in the guest; a terminal is hung up.
#[derive(Debug, clap::Args)]
pub(super) struct ExecArgs {
    /// Send standard input to the command; without this option its input is empty.
    #[arg(long, short)]
    interactive: bool,
    /// Give the command a terminal, which merges its standard output and standard error.
    #[arg(long, short)]
    tty: bool,
    #[command(flatten)]
    how: How,
    /// The VM.
    name: String,
    /// The command and its arguments; the image's own command by default.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Open a shell in a guest, on a new terminal.
#[derive(Debug, clap::Args)]
pub(super) struct ShellArgs {
    #[command(flatten)]
    how: How,
    /// The VM.
    name: String,
    /// A command to run instead of the user's shell.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// How a command is run.
#[derive(Debug, clap::Args)]
struct How {
    /// Set an environment variable (can be given several times).
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Start in this directory of the guest.
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// Run as this user: a name or number, optionally with :GROUP.
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// End the command after this number of seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    #[command(flatten)]
    wait: Wait,
}

impl How {
    fn exec(&self, command: Vec<String>) -> Exec {
        let mut environment = self.env.clone();
        for variable in &mut environment {
            // As in docker, a name without a value passes on this process's variable.
            if !variable.contains('=') {
                let value = std::env::var(&*variable).unwrap_or_default();
                *variable = format!("{variable}={value}");
            }
        }
        Exec {
            command,
            environment,
            directory: self.workdir.clone().unwrap_or_default(),
            user: self.user.clone().unwrap_or_default(),
            timeout_ms: self.timeout.map_or(0, |s| s.saturating_mul(1000)),
            ..Exec::default()
        }
    }
}

/// The output of `clone exec --json`.
#[derive(Serialize)]
struct Outcome {
    exit_code: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<i32>,
    timed_out: bool,
    stdout: String,
    stderr: String,
}

pub(super) fn exec(context: &Context, args: ExecArgs) -> Result<ExitCode> {
    let mut exec = args.how.exec(args.command);
    if args.tty {
        exec.environment.push(term());
    }
    let streams = Streams {
        input: args.interactive,
        terminal: args.tty,
    };
    Ok(ended(context, &args.name, args.how.wait, exec, streams))
}

pub(super) fn shell(context: &Context, args: ShellArgs) -> Result<ExitCode> {
    let login_shell = args.command.is_empty();
    let command = match login_shell {
        // The fallback for agents that do not know login shells.
        true => [
            "/bin/sh",
            "-c",
            "exec \"$(command -v bash || echo /bin/sh)\" -l",
        ]
        .map(str::to_owned)
        .to_vec(),
        false => args.command,
    };
    let mut exec = args.how.exec(command);
    exec.login_shell = login_shell;
    exec.environment.push(term());
    let streams = Streams {
        input: true,
        terminal: true,
    };
    if !std::io::stdin().is_terminal() {
        context
            .output
            .note("clone: standard input is no terminal; `clone exec -i` may suit better");
    }
    Ok(ended(context, &args.name, args.how.wait, exec, streams))
}

fn term() -> String {
    let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
    format!("TERM={term}")
}

/// Runs the command until it ends; every outcome is reported and becomes an exit code.
fn ended(context: &Context, name: &str, wait: Wait, exec: Exec, streams: Streams) -> ExitCode {
    let program = exec.command.first().cloned().unwrap_or_default();
    let begun_ns = agent::monotonic_ns();
    let connected = context
        .runtime()
        .and_then(|runtime| runtime.find(name))
        .and_then(|vm| Ok((agent::connect(&vm, wait)?, vm)));
    let (connection, vm) = match connected {
        Ok(connected) => connected,
        Err(error) => return refused(context, &error, CLONE_FAILED),
    };
    let exited = if context.output.is_json() {
        connection
            .exec(exec.clone())
            .and_then(|running| agent::timed(running, &exec).collect(MAX_OUTPUT))
            .map(|collected| {
                let exited = collected.exited;
                let outcome = Outcome {
                    exit_code: code_of(&exited),
                    signal: exited.signal,
                    timed_out: exited.timed_out,
                    stdout: String::from_utf8_lossy(&collected.stdout).into_owned(),
                    stderr: String::from_utf8_lossy(&collected.stderr).into_owned(),
                };
                context.output.print(&outcome, |_| String::new());
                exited
            })
    } else {
        agent::run(name, connection, exec, streams)
    };
    match exited {
        Ok(exited) => {
            if exited.timed_out {
                context.output.note(&format!(
                    "clone: {program} ran longer than allowed and was ended"
                ));
            }
            ExitCode::from(code_of(&exited))
        }
        // The reader of our output has closed it, which would have ended a program that writes to a
        // pipe.
        Err(ClientError::Local(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::from(128 + libc::SIGPIPE as u8)
        }
        Err(error) => {
            let code = match &error {
                ClientError::Refused(refusal) => match refusal.code() {
                    AgentCode::NotFound => NO_COMMAND,
                    AgentCode::Denied => CANNOT_RUN,
                    _ => CLONE_FAILED,
                },
                _ => CLONE_FAILED,
            };
            let reason = match &error {
                ClientError::Lost(_) => agent::why_lost(&vm, begun_ns),
                _ => None,
            };
            let error = reason.unwrap_or_else(|| agent::agent_error(name)(error));
            refused(context, &error, code)
        }
    }
}

fn refused(context: &Context, error: &ApiError, code: u8) -> ExitCode {
    context.output.error(error);
    ExitCode::from(code)
}

fn code_of(exited: &Exited) -> u8 {
    if exited.timed_out {
        return TIMED_OUT;
    }
    match (exited.code, exited.signal) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128_u8.wrapping_add(signal as u8),
        (None, None) => CLONE_FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        let exited = |code, signal, timed_out| Exited {
            code,
            signal,
            timed_out,
        };
        assert_eq!(code_of(&exited(Some(0), None, false)), 0);
        assert_eq!(code_of(&exited(Some(3), None, false)), 3);
        assert_eq!(code_of(&exited(None, Some(libc::SIGKILL), false)), 137);
        assert_eq!(code_of(&exited(None, Some(libc::SIGKILL), true)), 124);
    }

    #[test]
    fn a_variable_without_a_value_passes_ours_on() {
        let how = How {
            env: vec!["A=b=c".into(), "CARGO_PKG_NAME".into()],
            workdir: None,
            user: None,
            timeout: Some(2),
            wait: Wait::default(),
        };
        let exec = how.exec(vec!["true".into()]);
        assert_eq!(exec.environment, ["A=b=c", "CARGO_PKG_NAME=clone"]);
        assert_eq!(exec.timeout_ms, 2000);
    }
}
