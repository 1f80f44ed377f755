//! `clone migrate`: moves a running VM to another host.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use clap::ArgGroup;
use clone_api::control::MigrationDone;
use clone_api::{ApiError, Bytes, ErrorCode};
use clone_host::migrate::{self, Link};
use clone_start::error::Result;
use clone_template::Store;
use serde::Serialize;

use super::Context;
use super::output::human_bytes;

/// The longest time without progress until the VM's process has the stream, which sets its own.
const PATIENCE: Duration = Duration::from_secs(60);

/// Move a running VM to another host, where it goes on as the same VM.
///
/// Its memory, the writes to its ephemeral disks and the state of its devices are sent while it runs,
/// and what it changes meanwhile again; for the last of it, it is paused. What the other host has of
/// it already, because it has the VM's template, is not sent; a template that it lacks is sent first.
/// The VM keeps its name, its hardware addresses and, where they are free on the other host, its IP
/// addresses. A migration that fails leaves the VM where it is.
///
/// The other host needs the same version of clone, reached by ssh as a user who may run VMs there. A
/// VM that was booted needs its kernel and images at the same paths on both hosts. Disks that keep
/// their writes in a file do not travel.
///
/// If the connection is lost in the instant in which the VM changes hosts, it is paused on both, and
/// runs on neither until you decide. Look at both hosts with `clone ls --state`, and decide with
/// --confirm (it is where it was moved to) or --cancel (it is where it was before), on both hosts.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("what").required(true).args(["to", "via", "receive", "confirm", "cancel"])))]
pub(super) struct Args {
    /// The VM.
    #[arg(required_unless_present = "receive", conflicts_with = "receive")]
    name: Option<String>,
    /// The other host, as ssh knows it: [ssh://][USER@]HOST[:PORT].
    #[arg(long, value_name = "HOST", value_parser = Destination::parse)]
    to: Option<Destination>,
    /// Reach the other host by this command instead of ssh: it runs `clone migrate --receive` there,
    /// and passes on its standard input and output.
    #[arg(long, value_name = "COMMAND")]
    via: Option<OsString>,
    /// Take in the VM that comes over standard input; answers go to standard output. The sending
    /// side starts this.
    #[arg(long)]
    receive: bool,
    /// Say that the VM is where it was moved to: run it if it has arrived here, end it here if it
    /// was moved away.
    #[arg(long)]
    confirm: bool,
    /// Say that the VM is where it was before: let it go on if it was moved away from here, end it
    /// if it has arrived here.
    #[arg(long)]
    cancel: bool,
    /// Send at most this much in a second while the guest runs, as in 100M.
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["receive", "confirm", "cancel"])]
    bandwidth: Option<Bytes>,
    /// Do not move a VM that would be paused for longer than this, because its guest writes faster
    /// than it can be sent.
    #[arg(long, value_name = "MS", conflicts_with_all = ["receive", "confirm", "cancel"])]
    max_pause: Option<u64>,
}

/// A host that is reached by ssh.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Destination {
    /// As in `user@host`.
    host: String,
    port: Option<u16>,
}

impl Destination {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let rest = text.strip_prefix("ssh://").unwrap_or(text);
        let (host, port) = match rest.rsplit_once(':') {
            // The colons of an IPv6 address are none before a port.
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                let port = port.parse();
                (
                    host,
                    Some(port.map_err(|_| "the port must be a number from 0 to 65535")?),
                )
            }
            _ => (rest, None),
        };
        let host: String = host.chars().filter(|c| !matches!(c, '[' | ']')).collect();
        let plain = |c: char| c.is_ascii_alphanumeric() || "@.-_:%".contains(c);
        match !host.is_empty() && !host.starts_with('-') && host.chars().all(plain) {
            true => Ok(Self { host, port }),
            false => Err("a host is named as in ssh://user@host:22".to_owned()),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new("ssh");
        // Without a terminal on the other side, nothing changes the bytes on the way.
        command.arg("-T");
        if let Some(port) = self.port {
            command.arg("-p").arg(port.to_string());
        }
        command.args(["--", &self.host, "clone migrate --receive"]);
        command
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    if args.receive {
        return receive(context);
    }
    let name = args.name.as_deref().unwrap_or_default();
    if args.confirm || args.cancel {
        let runtime = context.runtime()?;
        migrate::tell(&runtime, &runtime.find(name)?, args.confirm)?;
        return Ok(ExitCode::SUCCESS);
    }
    let command = match (&args.to, &args.via) {
        (Some(to), _) => to.command(),
        (None, Some(via)) => {
            let mut command = Command::new("sh");
            command.arg("-c").arg(via);
            command
        }
        // The group has one of them.
        (None, None) => Command::new("ssh"),
    };
    send(context, args, name, command)
}

/// The output of `clone migrate --json`.
#[derive(Serialize)]
struct Moved<'a> {
    name: &'a str,
    #[serde(flatten)]
    done: MigrationDone,
}

fn send(context: &Context, args: &Args, name: &str, command: Command) -> Result<ExitCode> {
    let runtime = context.runtime()?;
    let vm = runtime.find(name)?;
    let options = migrate::Options {
        bytes_per_second: args.bandwidth.map(|size| size.0),
        max_pause_ms: args.max_pause,
    };
    let (link, mut carrier) = connect(command)?;
    let moved = migrate::send(&runtime, &vm, link, &options);
    // It ends with its standard input, which nobody has open any more.
    let carried = carrier.wait();
    let done = moved.map_err(|error| match carried {
        Ok(status) if error.code == ErrorCode::Unavailable && !status.success() => ApiError {
            message: format!("{} (the connecting command: {status})", error.message),
            ..error
        },
        _ => error,
    })?;
    context.output.print(&Moved { name, done }, |moved| {
        let done = &moved.done;
        format!(
            "{}: moved; {} sent in {:.1} s, paused for {:.1} ms",
            moved.name,
            human_bytes(done.bytes),
            done.total_us as f64 / 1e6,
            done.pause_us as f64 / 1e3
        )
    });
    Ok(ExitCode::SUCCESS)
}

/// Starts the command that leads to the other host, with one end of a socket as its standard input
/// and output.
fn connect(mut command: Command) -> Result<(Link, Child)> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |error: std::io::Error| {
        ApiError::new(
            ErrorCode::HostUnsupported,
            format!("cannot start {program}: {error}"),
        )
        .advise("install it, or name another command with --via")
    };
    let internal = |error: std::io::Error| ApiError::internal(&error);
    let (ours, theirs) = UnixStream::pair().map_err(internal)?;
    let output = theirs.try_clone().map_err(internal)?;
    let child = command
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(OwnedFd::from(output)))
        .spawn()
        .map_err(failed)?;
    // The command has its end, and it alone: its end is noticed.
    drop(command);
    let other = ours.try_clone().map_err(internal)?;
    let link = Link::new(ours.into(), other.into(), PATIENCE).map_err(internal)?;
    Ok((link, child))
}

fn receive(context: &Context) -> Result<ExitCode> {
    if std::io::stdin().is_terminal() {
        let message = "a VM comes over standard input, which is a terminal";
        return Err(ApiError::new(ErrorCode::BadRequest, message)
            .advise("run `clone migrate VM --to HOST` on the VM's host"));
    }
    let internal = |error: std::io::Error| ApiError::internal(&error);
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let output = std::io::stdout().as_fd().try_clone_to_owned();
    let link = Link::new(
        input.map_err(internal)?,
        output.map_err(internal)?,
        PATIENCE,
    );
    let runtime = context.runtime()?;
    let link = link.map_err(internal)?;
    let policy = migrate::Policy::default();
    let arrived = migrate::receive(&runtime, &Store::from_env()?, link, &policy)?;
    let name = arrived.vm.dir.name();
    for notice in &arrived.notices {
        context.output.note(&format!("[clone: {name}: {notice}]"));
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_named_as_for_ssh_and_never_as_options() {
        let parsed = |text: &str| {
            let Destination { host, port } = Destination::parse(text).unwrap();
            (host, port)
        };
        assert_eq!(parsed("b"), ("b".to_owned(), None));
        assert_eq!(parsed("ssh://root@b:22"), ("root@b".to_owned(), Some(22)));
        assert_eq!(parsed("[fd00::2]:22"), ("fd00::2".to_owned(), Some(22)));
        assert_eq!(parsed("fd00::2"), ("fd00::2".to_owned(), None));
        for wrong in ["", "-oProxyCommand=x", "ssh://-x", "a b", "a:port", "a;b"] {
            Destination::parse(wrong).unwrap_err();
        }
        let command = Destination::parse("b:7").unwrap().command();
        let words: Vec<_> = command.get_args().map(|it| it.to_string_lossy()).collect();
        assert_eq!(
            words,
            ["-T", "-p", "7", "--", "b", "clone migrate --receive"]
        );
    }
}
