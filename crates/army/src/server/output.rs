//! The output of a command: what is kept of it, and how it is sent as JSON.
//!
//! The text of a response can be six times as long as the output (a control character is `\u0001`),
//! so it is written in pieces as the client takes them, and never held as a whole.

use std::convert::Infallible;

use agent_proto::messages::Stream;
use army_api::exec::{Ended, ExecResult};
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream;

use super::budget::Reservation;

/// The most output that a response has, of both streams together.
const MAX_OUTPUT: usize = 16 << 20;
/// How much output is converted at a time, in bytes.
const PIECE: usize = 16 << 10;

/// The output of a command.
pub(super) struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    pub(super) omitted: u64,
    reservation: Reservation,
}

impl Output {
    /// No output yet. What is kept is taken from the budget.
    pub(super) fn new(reservation: Reservation) -> Self {
        Self {
            stdout: Vec::new(),
            stderr: Vec::new(),
            omitted: 0,
            reservation,
        }
    }

    /// Keeps the output that there is room for, and counts the rest.
    pub(super) fn add(&mut self, stream: Stream, data: &[u8]) {
        let room = MAX_OUTPUT - self.stdout.len() - self.stderr.len();
        let taken = self.reservation.grow(data.len().min(room));
        self.omitted += (data.len() - taken) as u64;
        let kept = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        if kept.capacity() - kept.len() < taken {
            // Doubling would hold up to twice of what was reserved.
            kept.reserve_exact(taken.max(kept.len() / 4));
        }
        kept.extend_from_slice(&data[..taken]);
    }

    /// The response about the command that wrote it: an [`ExecResult`] in JSON.
    pub(super) fn into_response(self, ended: Ended, took_us: u64) -> Response {
        let body = Body::from_stream(stream::iter(self.pieces(ended, took_us)));
        ([(header::CONTENT_TYPE, "application/json")], body).into_response()
    }

    /// The text of the response in pieces.
    fn pieces(
        self,
        ended: Ended,
        took_us: u64,
    ) -> impl Iterator<Item = Result<Bytes, Infallible>> + Send + use<> {
        let is_text = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok();
        let without_output = ExecResult {
            exit_code: ended.exit_code,
            signal: ended.signal,
            timed_out: ended.timed_out,
            stdout: String::new(),
            stderr: String::new(),
            lossy: !is_text(&self.stdout) || !is_text(&self.stderr),
            omitted_bytes: self.omitted,
            took_us,
        };
        let fields = serde_json::to_string(&without_output).unwrap_or_default();
        // No other field has a text, in which this could be found.
        let (begin, end) = fields.split_once(EMPTY_OUTPUT).unwrap_or_default();
        let reservation = self.reservation;
        let pieces = std::iter::once(format!("{begin}\"stdout\":\""))
            .chain(Escaped::new(self.stdout))
            .chain(std::iter::once("\",\"stderr\":\"".to_owned()))
            .chain(Escaped::new(self.stderr))
            .chain(std::iter::once(format!("\"{end}")));
        pieces.map(move |piece| {
            // The budget is free again when the last piece was taken.
            let _ = &reservation;
            Ok(Bytes::from(piece))
        })
    }
}

/// The fields of a result without output, as they are in its JSON.
const EMPTY_OUTPUT: &str = "\"stdout\":\"\",\"stderr\":\"\"";

/// Bytes as the inside of a JSON string, piece by piece. What is not UTF-8 is replaced.
struct Escaped {
    bytes: Vec<u8>,
    at: usize,
}

impl Escaped {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, at: 0 }
    }
}

impl Iterator for Escaped {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return None;
        }
        let mut piece = &rest[..rest.len().min(PIECE)];
        if piece.len() < rest.len() {
            piece = &piece[..piece.len() - cut_character(piece)];
        }
        self.at += piece.len();
        let text = serde_json::to_string(&String::from_utf8_lossy(piece)).unwrap_or_default();
        let inside = text.strip_prefix('"').and_then(|it| it.strip_suffix('"'));
        Some(inside.unwrap_or_default().to_owned())
    }
}

/// The number of bytes at the end that are the beginning of a character.
fn cut_character(piece: &[u8]) -> usize {
    let last = piece
        .utf8_chunks()
        .last()
        .map_or(&[][..], |it| it.invalid());
    match std::str::from_utf8(last) {
        Err(error) if error.error_len().is_none() => last.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::budget::{Budget, BufferLimits};
    use super::*;

    fn output() -> Output {
        Output::new(Budget::new(BufferLimits::default()).reservation("red"))
    }

    fn result(output: Output, ended: Ended) -> ExecResult {
        let pieces: Vec<u8> = output
            .pieces(ended, 7)
            .flat_map(|piece| {
                let piece = piece.unwrap();
                assert!(piece.len() <= 6 * PIECE);
                piece.to_vec()
            })
            .collect();
        serde_json::from_slice(&pieces).unwrap()
    }

    fn exited(code: Option<i32>) -> Ended {
        Ended {
            exit_code: code,
            signal: None,
            timed_out: false,
        }
    }

    #[test]
    fn output_beyond_the_limit_is_counted_and_not_kept() {
        let mut output = output();
        output.add(Stream::Stderr, b"eeeeeeeeee");
        output.add(Stream::Stdout, &vec![b'o'; MAX_OUTPUT]);
        output.add(Stream::Stdout, b"more");
        assert_eq!(output.stderr.len() + output.stdout.len(), MAX_OUTPUT);
        assert_eq!(output.omitted, 14);
    }

    #[test]
    fn output_beyond_the_budget_is_counted_and_the_budget_is_given_back() {
        let budget = Budget::new(BufferLimits {
            per_tenant: 100,
            total: 1000,
        });
        let mut output = Output::new(budget.reservation("red"));
        output.add(Stream::Stdout, &[b'o'; 150]);
        assert_eq!((output.stdout.len(), output.omitted), (100, 50));
        let result = result(output, exited(Some(0)));
        assert_eq!((result.stdout.len(), result.omitted_bytes), (100, 50));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn pieces_are_the_json_of_the_whole_output() {
        // Characters of four bytes lie across every boundary of pieces, and one is cut off.
        let text = "a\u{1}\"\\é€😀".repeat(PIECE / 5);
        let mut bytes = text.clone().into_bytes();
        bytes.extend(b"\xFF\xF0\x9F");
        let mut output = output();
        output.add(Stream::Stdout, &bytes);
        output.add(Stream::Stderr, text.as_bytes());
        let result = result(output, exited(Some(3)));
        assert_eq!(result.stdout, String::from_utf8_lossy(&bytes));
        assert_eq!(result.stderr, text);
        assert_eq!((result.exit_code, result.lossy), (Some(3), true));
        assert_eq!(result.took_us, 7);
    }
}
