//! What is done in guests through their agents, for the API and for builds.

use std::collections::BTreeMap;
use std::time::Duration;

use agent_client::{Event as AgentEvent, Running};
use agent_proto::messages::{Exec as AgentExec, Exited, Put, Stream};
use army_api::exec::{CommandEvent, Ended, Exec, FilePath, MAX_EXEC_MS, OutputStream};
use tokio::sync::mpsc;

use crate::{Error, ErrorKind, Result, guest_files};

/// The permissions of a new file, where the client does not say.
const DEFAULT_MODE: u32 = 0o644;
/// How long a guest keeps a command after somebody has read its end, in milliseconds.
pub const KEEP_MS: u64 = 600_000;
/// How much longer than its own limit a command is waited for: its agent ends it, but a guest may
/// hang.
const GRACE: Duration = Duration::from_secs(15);

/// The limit of a connection for work that the agent ends after `limit`.
pub fn with_grace(limit: Duration) -> Duration {
    limit.saturating_add(GRACE)
}

/// Checks a command before its guest is reached.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] where it is empty.
pub fn check_command(command: &[String]) -> Result<()> {
    if command.is_empty() {
        let message = "`command` is empty: it takes a program and its arguments";
        return Err(Error::new(ErrorKind::InvalidRequest, message));
    }
    Ok(())
}

/// The time limit of a command that a request waits for, where the request has one.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] where it is longer than a request may wait.
pub fn check_time_limit(timeout_ms: Option<u64>) -> Result<Option<Duration>> {
    match timeout_ms {
        Some(limit) if limit > MAX_EXEC_MS => {
            let message = format!(
                "`timeout_ms` is {limit}, and a request waits for a command for {MAX_EXEC_MS} at \
                 most (1 hour): start a longer command in the background"
            );
            Err(Error::new(ErrorKind::InvalidRequest, message))
        }
        limit => Ok(limit.map(Duration::from_millis)),
    }
}

/// A command in the agent's protocol, with the VM's environment, and with a time limit if there is
/// one.
pub fn exec(
    command: Exec,
    mut environment: BTreeMap<String, String>,
    limit: Option<Duration>,
) -> AgentExec {
    // In the agent's protocol, 0 is no limit.
    let milliseconds =
        |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1);
    environment.extend(command.environment);
    AgentExec {
        command: command.command,
        environment: environment
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect(),
        directory: command.directory.unwrap_or_default(),
        user: command.user.unwrap_or_default(),
        timeout_ms: limit.map_or(0, milliseconds),
        input: command.stdin.is_some(),
        ..AgentExec::default()
    }
}

/// A file in the agent's protocol.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] where the path is not absolute, or the permissions are not octal.
pub fn put(file: FilePath) -> Result<Put> {
    guest_files::check_path(&file.path)?;
    let mode = file.mode.as_deref();
    let mode = mode.map_or(Ok(DEFAULT_MODE), guest_files::mode)?;
    Ok(Put {
        path: file.path,
        mode,
        name: file.name.unwrap_or_default(),
        ..Put::default()
    })
}

/// Sends the events of a command to a listener, as far as `wrap` makes something of them, and
/// returns how the command ended. A slow listener makes the command wait.
///
/// # Errors
/// Where the connection to the agent is lost, or where the listener goes away, even while the
/// command has no output.
pub async fn follow<T: Send + 'static>(
    mut running: Running,
    listener: &mpsc::Sender<T>,
    wrap: impl Fn(CommandEvent) -> Option<T>,
) -> Result<Ended> {
    let mut texts = [Text::default(), Text::default()];
    loop {
        let event = tokio::select! {
            event = running.next_event() => event?,
            () = listener.closed() => return Err(client_disconnected()),
        };
        let arrived = running.arrived();
        let (event, ended) = match event {
            AgentEvent::Output(stream, data) => {
                let event = CommandEvent::Output {
                    stream: output_stream(stream),
                    text: texts[usize::from(stream == Stream::Stderr)].take(&data),
                    cursor: match stream {
                        Stream::Stdout => arrived.stdout_cursor,
                        Stream::Stderr => arrived.stderr_cursor,
                    },
                };
                (event, None)
            }
            AgentEvent::Lost(stream, bytes) => {
                let stream = output_stream(stream);
                (CommandEvent::Lost { stream, bytes }, None)
            }
            AgentEvent::Exited(exited) => {
                let ended = exit_status(exited);
                (CommandEvent::Ended(ended), Some(ended))
            }
        };
        let sent = match wrap(event) {
            Some(event) => listener.send(event).await.is_ok(),
            None => true,
        };
        match ended {
            Some(ended) => return Ok(ended),
            None if sent => {}
            None => return Err(client_disconnected()),
        }
    }
}

/// The error of work whose client has gone away.
pub fn client_disconnected() -> Error {
    Error::new(ErrorKind::Conflict, "the client has disconnected")
}

/// How a command ended, in the API's terms.
pub fn exit_status(exited: Exited) -> Ended {
    Ended {
        exit_code: exited.code,
        signal: exited.signal,
        timed_out: exited.timed_out,
    }
}

fn output_stream(stream: Stream) -> OutputStream {
    match stream {
        Stream::Stdout => OutputStream::Stdout,
        Stream::Stderr => OutputStream::Stderr,
    }
}

/// Converts output into text as it arrives. A character may be cut in two between arrivals.
#[derive(Default)]
struct Text(Vec<u8>);

impl Text {
    fn take(&mut self, data: &[u8]) -> String {
        self.0.extend_from_slice(data);
        let whole = match std::str::from_utf8(&self.0) {
            // The end is the beginning of a character.
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => self.0.len(),
        };
        let rest = self.0.split_off(whole);
        let text = String::from_utf8_lossy(&self.0).into_owned();
        self.0 = rest;
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_waits_for_a_command_for_an_hour_at_most() {
        assert_eq!(check_time_limit(None).unwrap(), None);
        let hour = check_time_limit(Some(3_600_000)).unwrap();
        assert_eq!(hour, Some(Duration::from_secs(3600)));
        let refused = check_time_limit(Some(3_600_001)).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::InvalidRequest);
        assert!(refused.message.contains("1 hour"), "{refused}");
    }

    #[test]
    fn characters_that_are_cut_in_two_come_whole() {
        let mut text = Text::default();
        let bytes = "aä€".as_bytes();
        let pieces: String = bytes.iter().map(|byte| text.take(&[*byte])).collect();
        assert_eq!(pieces, "aä€");
        assert_eq!(text.take(b"\xFFb"), "\u{FFFD}b");
    }
}
