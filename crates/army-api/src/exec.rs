//! Commands in guests, and files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// A command to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program and its arguments. No shell stands between.
    #[schema(min_items = 1)]
    pub command: Vec<String>,
    /// Added to the environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// Where it runs; the user's home where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// As whom: a name or a number, the agent's own (root) where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Its input, all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// It is killed after so many milliseconds; 60,000 where nothing is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u64>,
}

/// What a command did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// Its exit status; absent where a signal ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether its time ran out.
    pub timed_out: bool,
    /// What it wrote to its standard output. Bytes that are no UTF-8 are replaced; `lossy` says so.
    pub stdout: String,
    /// What it wrote to its standard error output, likewise.
    pub stderr: String,
    /// Whether some of the output was no UTF-8: fetch it as a file or over the terminal, whole.
    #[serde(default)]
    pub lossy: bool,
    /// Bytes of output beyond what a reply holds, 16 MiB, that are not in here.
    #[serde(default)]
    pub omitted_bytes: u64,
    /// From the request's arrival to the command's end, in microseconds.
    pub took_us: u64,
}

/// A command that runs, or ran, without anybody waiting for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Command {
    /// What it is called in its VM.
    pub id: u64,
    /// Its process id in the guest.
    pub pid: u32,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// How it ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ended {
    /// Its exit status; absent where a signal ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether its time ran out.
    pub timed_out: bool,
}

/// From where a command's output is read: so many bytes of each stream are there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Of the standard output.
    #[serde(default)]
    pub stdout: u64,
    /// Of the standard error output.
    #[serde(default)]
    pub stderr: u64,
}

/// What happens to a command: the `data` of a server-sent event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum CommandEvent {
    /// It wrote something.
    Output {
        /// Where.
        stream: OutputStream,
        /// What. Bytes that are no UTF-8 are replaced.
        text: String,
        /// How much of this stream is there with it: [`Cursor`] for who reads on later.
        cursor: u64,
    },
    /// Output is gone: it was read before, or nobody read it until there was too much.
    Lost {
        /// Of which stream.
        stream: OutputStream,
        /// How much.
        bytes: u64,
    },
    /// It ended, and is forgotten now.
    Ended(Ended),
}

/// One of a command's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// The standard output.
    Stdout,
    /// The standard error output.
    Stderr,
}

/// A signal for a command and what it started in its process group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SendSignal {
    /// Its number: 15 asks the command to end, 9 ends it.
    #[schema(minimum = 1, maximum = 64)]
    pub signal: i32,
}

/// A terminal to be opened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Terminal {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
    /// The program; the user's shell where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
}

/// What a client sends over a terminal's WebSocket as text; bytes for the program come as binary
/// messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum TerminalMessage {
    /// The window has another size.
    Resize {
        /// Lines.
        rows: u16,
        /// Columns.
        columns: u16,
    },
    /// From the server, before it closes: the program ended.
    Exited {
        /// Its exit status; absent where a signal ended it.
        exit_code: Option<i32>,
    },
}

/// What either side sends over a port's WebSocket as text; the connection's bytes are binary
/// messages. The server closes when both sides have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum PortMessage {
    /// There is no more from this side; the other one may go on.
    End,
}

/// A file in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct FilePath {
    /// Its absolute path in the guest.
    pub path: String,
    /// Its permissions when it is written, as in `644`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// The file's name where the path is a directory and the file is written. Without one, a
    /// directory is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}
