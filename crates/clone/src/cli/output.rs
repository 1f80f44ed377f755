//! Printing: text for people, JSON for programs.
//!
//! The format of standard output is stable. A reader that closes it early (`clone ls | head -1`) is
//! not an error.

use std::io::{self, Write};

use clone_api::{ApiError, ClientError, ErrorCode};
use serde::Serialize;

/// The format of the output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    json: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(super) fn is_json(self) -> bool {
        self.json
    }

    /// Prints `value` as JSON, or `text` made of it.
    pub(super) fn print<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) {
        let line = if self.json {
            // The values have string keys and finite numbers, so they always serialise.
            serde_json::to_string_pretty(value).unwrap_or_default()
        } else {
            text(value)
        };
        if !line.is_empty() {
            line_to(&mut io::stdout().lock(), &line);
        }
    }

    /// Prints an error and its advice to standard error.
    pub(super) fn error(self, error: &ApiError) {
        let mut stderr = io::stderr().lock();
        if self.json {
            let text = serde_json::to_string(error).unwrap_or_default();
            line_to(&mut stderr, &text);
            return;
        }
        line_to(&mut stderr, &format!("clone: {}", error.message));
        if let Some(advice) = &error.advice {
            line_to(&mut stderr, &format!("  try: {advice}"));
        }
    }

    /// Prints a message that is not part of the result, for people only.
    pub(super) fn note(self, text: &str) {
        if !self.json {
            line_to(&mut io::stderr().lock(), text);
        }
    }
}

fn line_to(out: &mut impl Write, line: &str) {
    // An error means that nobody reads the stream, so it cannot be reported.
    let _ = writeln!(out, "{}", line.trim_end_matches('\n'));
}

/// Columns padded to their widest cell, two spaces apart.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!("{cell:<width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// A number of bytes for people, with three digits.
pub(super) fn human_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1000.0 {
            let digits = usize::from(value < 10.0 && unit != "B");
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Makes a closure that converts an error of the control socket's client for the user of the VM
/// `name`.
pub(super) fn control_error(name: &str) -> impl Fn(ClientError) -> ApiError {
    move |error| match error {
        ClientError::Refused(refusal) => refusal,
        ClientError::Connect { .. } => ApiError::new(
            ErrorCode::NotFound,
            format!("the VM `{name}` does not answer: {error}"),
        )
        .advise("it may just have ended: look with `clone ls`"),
        ClientError::Transfer { .. } => {
            ApiError::new(ErrorCode::Timeout, format!("the VM `{name}`: {error}"))
                .advise(format!("if it hangs, end it: clone kill {name}"))
        }
        ClientError::Malformed { .. } => {
            ApiError::new(ErrorCode::Internal, format!("the VM `{name}`: {error}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_do_not_end_in_spaces() {
        let row = |cells: &[&str]| cells.iter().map(|&cell| cell.to_owned()).collect();
        let text = table(&[row(&["NAME", "STATE"]), row(&["a-long-name", "up"])]);
        assert_eq!(text, "NAME         STATE\na-long-name  up\n");
    }

    #[test]
    fn sizes_for_people_have_few_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            (1000 << 20, "1.0 GiB"),
        ] {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
