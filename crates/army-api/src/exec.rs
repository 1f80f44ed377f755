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

/// A file in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct FilePath {
    /// Its absolute path in the guest.
    pub path: String,
    /// Its permissions for a new one, as in `644`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}
