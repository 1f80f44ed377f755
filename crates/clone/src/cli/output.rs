//! Printing: text for people, JSON for programs.
//!
//! Standard output is a contract. A reader that goes away early (`clone ls | head -1`) is no
//! failure.

use std::io::{self, Write};

use clone_api::{ApiError, ClientError, ErrorCode};
use serde::Serialize;

/// How to print.
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
            // Our types have text keys and finite numbers: they always serialise.
            serde_json::to_string_pretty(value).unwrap_or_default()
        } else {
            text(value)
        };
        if !line.is_empty() {
            line_to(&mut io::stdout().lock(), &line);
        }
    }

    /// Tells what went wrong, and what to do.
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

    /// Tells something that is no result, for people only.
    pub(super) fn note(self, text: &str) {
        if !self.json {
            line_to(&mut io::stderr().lock(), text);
        }
    }
}

fn line_to(out: &mut impl Write, line: &str) {
    // Nobody reads it: there is no one left to tell that to.
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

/// An error of the control socket's client, for the user of the VM called `name`.
pub(super) fn told(name: &str) -> impl Fn(ClientError) -> ApiError {
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
