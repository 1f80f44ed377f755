//! Commands, terminals, port connections and files in guests.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// The longest time limit of a command that a request waits for, in milliseconds: 1 hour.
pub const MAX_EXEC_MS: u64 = 3_600_000;

/// A command to run in a VM, whose end the request waits for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exec {
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
    /// The complete standard input of the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// The time limit, in milliseconds, at least 1, after which the command is killed. The default
    /// is 60,000, and the maximum is 3,600,000 (1 hour). Start a longer command without waiting for
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 3_600_000)]
    pub timeout_ms: Option<u64>,
}

/// A command to start in a VM without waiting for its end. It gets no input.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartCommand {
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
}

impl From<StartCommand> for Exec {
    fn from(start: StartCommand) -> Self {
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

/// The outcome of a command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// The exit status of the command. It is absent if a signal ended the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The number of the signal that ended the command, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether the command was killed because its time limit was exceeded.
    pub timed_out: bool,
    /// The standard output of the command. Bytes that are not valid UTF-8 are replaced, and `lossy`
    /// is then true.
    pub stdout: String,
    /// The standard error output of the command. Bytes that are not valid UTF-8 are replaced, and
    /// `lossy` is then true.
    pub stderr: String,
    /// Whether some of the output was not valid UTF-8 and was replaced. Fetch such output as a file
    /// or over a terminal.
    #[serde(default)]
    pub lossy: bool,
    /// The number of bytes of output that were omitted because a response holds at most 16 MiB of
    /// output.
    #[serde(default)]
    pub omitted_bytes: u64,
    /// The time from the arrival of the request to the end of the command, in microseconds.
    pub took_us: u64,
}

/// A command that was started in a VM without waiting for its end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Command {
    /// The id of the command, unique within its VM.
    pub id: u64,
    /// The process id of the command in the guest.
    pub pid: u32,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The way in which the command ended. It is absent while the command runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// The way in which a command ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ended {
    /// The exit status of the command. It is absent if a signal ended the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The number of the signal that ended the command, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether the command was killed because its time limit was exceeded.
    pub timed_out: bool,
}

/// The position from which the output of a command is read: the number of bytes of each stream that
/// the client already has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// The number of bytes of the standard output that the client already has. The default is 0.
    #[serde(default)]
    pub stdout: u64,
    /// The number of bytes of the standard error output that the client already has. The default is
    /// 0.
    #[serde(default)]
    pub stderr: u64,
}

/// The progress of a command: the `data` of a server-sent event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum CommandEvent {
    /// The command has written output.
    Output {
        /// The output stream that the text was written to.
        stream: OutputStream,
        /// The text that was written. Bytes that are not valid UTF-8 are replaced.
        text: String,
        /// The position in the stream after this text, in bytes. A client that reconnects passes it
        /// as the cursor of the stream.
        cursor: u64,
    },
    /// Output is no longer available: it was dropped because there was too much of it.
    Lost {
        /// The output stream that the lost output was written to.
        stream: OutputStream,
        /// The number of bytes that were lost.
        bytes: u64,
    },
    /// The command has ended. Its end and its newest output can be read for 10 minutes from now on.
    Ended(Ended),
}

/// An output stream of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// The standard output.
    Stdout,
    /// The standard error output.
    Stderr,
}

/// A request to send a signal to the process group of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SendSignal {
    /// The number of the signal, 1 to 64: 15 asks the command to terminate, 9 kills it.
    #[schema(minimum = 1, maximum = 64)]
    pub signal: i32,
}

/// A request to open a terminal in a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Terminal {
    /// The height of the terminal window, in rows of text.
    pub rows: u16,
    /// The width of the terminal window, in columns of text.
    pub columns: u16,
    /// The command line to run, which is passed to `/bin/sh -c`. The default is the user's login
    /// shell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
}

/// A text message on the WebSocket of a terminal. The input and the output of the program are sent
/// as binary messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum TerminalMessage {
    /// The client tells the server that its window has a new size.
    Resize {
        /// The height of the terminal window, in rows of text.
        rows: u16,
        /// The width of the terminal window, in columns of text.
        columns: u16,
    },
    /// The server tells the client that the program has ended, and then closes the WebSocket.
    Exited {
        /// The exit status of the program. It is absent if a signal ended the program.
        exit_code: Option<i32>,
    },
}

/// A text message, in either direction, on the WebSocket of a port. The bytes of the TCP connection
/// are sent as binary messages. The server closes the WebSocket when both sides have sent `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum PortMessage {
    /// The sender has no more bytes to send. The other side may go on sending.
    End,
}

/// The path of a file in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct FilePath {
    /// The absolute path of the file in the guest.
    pub path: String,
    /// The permissions of a file that is written, in octal. The default is `644`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// The file name to use if the path is a directory and a file is written. Without a name, a
    /// path that is a directory is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}
