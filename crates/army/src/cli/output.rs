//! Output for people.

use std::io::Write;

use army_api::client::ClientError;
use serde::Serialize;

/// Prints lines. It is not an error if the reader has closed the stream.
pub(super) fn print(text: &str) {
    let text = text.trim_end_matches('\n');
    if !text.is_empty() {
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}

/// Prints a note beside the output.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "army: {text}");
}

/// Prints an error and what to do about it.
pub(super) fn error(error: &anyhow::Error) {
    let mut lines = format!("army: {error:#}");
    if let Some(ClientError::Refused(problem)) = error.downcast_ref()
        && let Some(advice) = &problem.advice
    {
        lines += &format!("\n  try: {advice}");
    }
    let _ = writeln!(std::io::stderr(), "{lines}");
}

/// A table with a line of heads.
pub(super) fn table(heads: &[&str], lines: Vec<Vec<String>>) -> String {
    let heads = heads.iter().map(|head| (*head).to_owned()).collect();
    let all: Vec<Vec<String>> = std::iter::once(heads).chain(lines).collect();
    let columns = all.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = all.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in &all {
        let cells = line.iter().zip(&widths);
        let padded: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text += padded.join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// A size in the largest unit in which it is at least 1.
pub(super) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    match unit {
        "B" => format!("{count} B"),
        _ => format!("{value:.1} {unit}"),
    }
}

/// Microseconds as milliseconds.
pub(super) fn ms(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}

/// A state as the API writes it.
pub(super) fn word(state: &impl Serialize) -> String {
    let text = serde_json::to_string(state).unwrap_or_default();
    text.trim_matches('"').to_owned()
}

/// Reads a KEY=VALUE argument.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write it as KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// The exit status of a command that exceeded its time limit, as of timeout(1).
const TIMED_OUT: u8 = 124;
/// The base of the exit status of a command that a signal ended, as in shells: 128 plus the signal.
const SIGNAL_BASE: i32 = 128;

/// The exit status for the end of a command.
pub(super) fn code_of(exit_code: Option<i32>, signal: Option<i32>, timed_out: bool) -> u8 {
    match (exit_code, signal) {
        _ if timed_out => TIMED_OUT,
        (Some(code), _) => code as u8,
        (None, Some(signal)) => (SIGNAL_BASE + signal) as u8,
        (None, None) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let lines = vec![
            vec!["a".to_owned(), "1".to_owned()],
            vec!["long".to_owned(), "22".to_owned()],
        ];
        assert_eq!(table(&["N", "X"], lines), "N     X\na     1\nlong  22\n");
    }

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
        assert_eq!(ms(1250), "1.2 ms");
    }
}
