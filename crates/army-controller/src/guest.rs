//! What is done in guests, whoever asks for it: how their agents are told, and what they tell.

use std::collections::BTreeMap;
use std::time::Duration;

use agent_proto::client::{Connection, Deadline, Event as AgentEvent, Running};
use agent_proto::messages::{Exec as AgentExec, Exited, Put, Stream};
use army_api::exec::{CommandEvent, Ended, Exec, FilePath, OutputStream};
use army_api::{Problem, ProblemKind};
use tokio::sync::{mpsc, oneshot};

use crate::Node;
use army_node_api::{InUse, of_agent};

/// Permissions of a new file, where the client does not say.
const DEFAULT_MODE: u32 = 0o644;
/// How much longer an agent that should have ended a command is waited for: a guest may hang.
const GRACE: Duration = Duration::from_secs(15);

/// A connection to a VM's agent for work that it ends after `limit`, given up a little later.
pub fn connect(node: &Node, vm: &str, limit: Duration) -> Result<(Connection, InUse), Problem> {
    let (mut connection, in_use) = node.agent(vm)?;
    connection.set_deadline(Deadline::after(limit.saturating_add(GRACE)));
    Ok((connection, in_use))
}

/// What is wrong with a command before anybody is asked.
pub fn check_command(command: &[String]) -> Result<(), Problem> {
    if command.is_empty() {
        let detail = "`command` is empty: it takes a program and its arguments";
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    Ok(())
}

/// A command as its VM's agent is told, with the VM's environment and its limit, if any.
pub fn exec(
    asked: Exec,
    mut environment: BTreeMap<String, String>,
    limit: Option<Duration>,
) -> AgentExec {
    // To the agent, 0 is no limit.
    let milliseconds =
        |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1);
    environment.extend(asked.environment);
    AgentExec {
        command: asked.command,
        environment: environment
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect(),
        directory: asked.directory.unwrap_or_default(),
        user: asked.user.unwrap_or_default(),
        timeout_ms: limit.map_or(0, milliseconds),
        input: asked.stdin.is_some(),
        ..AgentExec::default()
    }
}

/// A file as the agent is told to write it.
///
/// # Errors
/// [`ProblemKind::InvalidRequest`] where that is no path, or these are no permissions.
pub fn put(file: FilePath) -> Result<Put, Problem> {
    let invalid = |detail: String| Problem::new(ProblemKind::InvalidRequest, detail);
    if !file.path.starts_with('/') || file.path.contains('\0') {
        let path = file.path.escape_debug();
        return Err(invalid(format!(
            "`{path}` is no absolute path in the guest"
        )));
    }
    let mode = match &file.mode {
        None => DEFAULT_MODE,
        Some(mode) => u32::from_str_radix(mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o7777)
            .ok_or_else(|| invalid(format!("`{}` are no permissions", mode.escape_debug())))?,
    };
    Ok(Put {
        path: file.path,
        mode,
        name: file.name.unwrap_or_default(),
        ..Put::default()
    })
}

/// Sends what a command does to who listens, as far as `wrap` makes something of it, and returns
/// how it ended. Blocks, and is called where there is a runtime.
///
/// # Errors
/// Where the agent cannot be heard to the end. That is so, too, when the listener goes away, which
/// is noticed even while the command says nothing.
pub fn follow<T: Send + 'static>(
    mut running: Running,
    listener: &mpsc::Sender<T>,
    wrap: impl Fn(CommandEvent) -> Option<T>,
) -> Result<Ended, Problem> {
    let input = running.input();
    let watched = listener.clone();
    let (_working, done) = oneshot::channel::<()>();
    tokio::spawn(async move {
        tokio::select! {
            () = watched.closed() => input.disconnect(),
            _ = done => {}
        }
    });
    let mut texts = [Text::default(), Text::default()];
    loop {
        let event = running.next_event().map_err(|error| of_agent(&error))?;
        let arrived = running.arrived();
        let (event, ended) = match event {
            AgentEvent::Output(stream, data) => {
                let event = CommandEvent::Output {
                    stream: told(stream),
                    text: texts[usize::from(stream == Stream::Stderr)].take(&data),
                    cursor: match stream {
                        Stream::Stdout => arrived.stdout_cursor,
                        Stream::Stderr => arrived.stderr_cursor,
                    },
                };
                (event, None)
            }
            AgentEvent::Lost(stream, bytes) => {
                let stream = told(stream);
                (CommandEvent::Lost { stream, bytes }, None)
            }
            AgentEvent::Exited(exited) => {
                let ended = how(exited);
                (CommandEvent::Ended(ended), Some(ended))
            }
        };
        let heard = wrap(event).is_none_or(|event| listener.blocking_send(event).is_ok());
        match ended {
            Some(ended) => return Ok(ended),
            None if heard => {}
            None => return Err(left()),
        }
    }
}

/// That who wanted to know has gone away.
pub fn left() -> Problem {
    Problem::new(ProblemKind::Conflict, "nobody listens any more")
}

/// How a command ended.
pub fn how(exited: Exited) -> Ended {
    Ended {
        exit_code: exited.code,
        signal: exited.signal,
        timed_out: exited.timed_out,
    }
}

fn told(stream: Stream) -> OutputStream {
    match stream {
        Stream::Stdout => OutputStream::Stdout,
        Stream::Stderr => OutputStream::Stderr,
    }
}

/// Bytes that become text piece by piece: a character may be cut in two.
#[derive(Default)]
struct Text(Vec<u8>);

impl Text {
    fn take(&mut self, data: &[u8]) -> String {
        self.0.extend_from_slice(data);
        let whole = match std::str::from_utf8(&self.0) {
            // The beginning of a character, and no more than that.
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
    fn characters_that_are_cut_in_two_come_whole() {
        let mut text = Text::default();
        let bytes = "aä€".as_bytes();
        let pieces: String = bytes.iter().map(|byte| text.take(&[*byte])).collect();
        assert_eq!(pieces, "aä€");
        assert_eq!(text.take(b"\xFFb"), "\u{FFFD}b");
    }
}
