//! Commands over one WebSocket: separate output streams, standard input, signals, and the end.
//!
//! Text messages are [`StreamRequest`]s of the client and [`StreamEvent`]s of the server. Binary
//! messages are data: their first byte says of which stream, [`STDIN`] from the client, and
//! [`STDOUT`] or [`STDERR`] from the server.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Problem;
use crate::exec::{Ended, Exec, OutputStream};

/// The first byte of a binary message with input.
pub const STDIN: u8 = 0;
/// The first byte of a binary message with standard output.
pub const STDOUT: u8 = 1;
/// The first byte of a binary message with standard error output.
pub const STDERR: u8 = 2;

/// A command to run over a WebSocket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartStream {
    /// The program and its arguments, at least one element. The program is executed directly,
    /// without a shell.
    #[schema(min_items = 1)]
    pub command: Vec<String>,
    /// Environment variables that are added to those of the VM.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// The working directory of the command. The default is the user's home directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// The user that runs the command, as a name or a number. The default is the agent's user,
    /// root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The time limit, in milliseconds, at least 1, after which the command is killed. By default
    /// there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u64>,
    /// Whether the client sends input. Without it, the command's input is empty.
    #[serde(default)]
    pub input: bool,
    /// Whether the client acknowledges output. Output that was not acknowledged can be read again
    /// after a lost connection, and the command waits when 256 KiB of a stream were not. Without it,
    /// what the server has sent counts as arrived.
    #[serde(default)]
    pub acknowledge: bool,
}

impl From<StartStream> for Exec {
    fn from(start: StartStream) -> Self {
        Self {
            command: start.command,
            environment: start.environment,
            directory: start.directory,
            user: start.user,
            stdin: None,
            timeout_ms: start.timeout_ms,
        }
    }
}

/// A text message of the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[schema(example = json!({"kind": "start", "command": ["cat"], "input": true}))]
pub enum StreamRequest {
    /// Starts the command. It is the first message, and the only one of its kind.
    Start(StartStream),
    /// Ends the input.
    EndInput,
    /// Sends a signal to the command and the processes that it started.
    Signal {
        /// The number of the signal, 1 to 64.
        signal: i32,
    },
    /// Output has arrived, where the client has said that it acknowledges output.
    Acknowledge {
        /// The number of bytes of the standard output.
        stdout: u64,
        /// The number of bytes of the standard error output.
        stderr: u64,
    },
}

/// A text message of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[schema(example = json!({"kind": "ended", "exit_code": 0, "timed_out": false}))]
pub enum StreamEvent {
    /// The command runs. After a lost connection, a client attaches to it by its id.
    Started {
        /// The id of the command, unique within its VM.
        id: u64,
        /// The process id of the command in the guest.
        pid: u32,
        /// The number of bytes of input that have arrived, from former connections. The client goes
        /// on from there.
        input: u64,
    },
    /// Output is no longer available.
    Lost {
        /// The output stream that the lost output was written to.
        stream: OutputStream,
        /// The number of bytes that were lost.
        bytes: u64,
    },
    /// The command has ended, and all of its output was sent. The WebSocket is closed. The end can be
    /// read again for 10 minutes.
    Ended(Ended),
    /// The command could not be started, or its guest was lost. The WebSocket is closed.
    Failed {
        /// Why.
        problem: Problem,
    },
}

/// How a client attaches to a command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct AttachStream {
    /// The number of bytes of the standard output that the client already has. The default is 0.
    #[serde(default)]
    pub stdout: u64,
    /// The number of bytes of the standard error output that the client already has. The default is
    /// 0.
    #[serde(default)]
    pub stderr: u64,
    /// Whether the client reads beside others, instead of in the place of the one that is attached.
    /// The command does not wait for it: it may lose output. The default is false.
    #[serde(default)]
    pub observe: bool,
    /// Whether the client acknowledges output. The default is false.
    #[serde(default)]
    pub acknowledge: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_what_the_description_shows() {
        let text = r#"{"kind":"start","command":["cat"],"input":true}"#;
        let StreamRequest::Start(start) = serde_json::from_str(text).unwrap() else {
            panic!("{text}")
        };
        assert!(start.input && start.command == ["cat"]);
        let wrong = r#"{"kind":"start","command":["cat"],"surprise":1}"#;
        assert!(serde_json::from_str::<StreamRequest>(wrong).is_err());
        let ended = StreamEvent::Ended(Ended::default());
        let text = serde_json::to_string(&ended).unwrap();
        assert_eq!(text, r#"{"kind":"ended","timed_out":false}"#);
        assert_eq!(serde_json::from_str::<StreamEvent>(&text).unwrap(), ended);
    }
}
