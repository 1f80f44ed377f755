//! Bytes that wait to be sent, and their end.

use std::collections::VecDeque;

use agent_proto::{CHUNK, INPUT_WINDOW};

/// Bytes that wait to be sent.
#[derive(Debug, Default)]
pub(crate) struct PendingInput {
    bytes: VecDeque<u8>,
    end: End,
}

#[derive(Debug, Default, PartialEq)]
enum End {
    /// More may come.
    #[default]
    Open,
    /// The end follows the bytes that wait.
    Pending,
    /// The end was sent.
    Sent,
}

/// What is sent next.
pub(crate) enum Piece {
    Bytes(Vec<u8>),
    End,
}

impl PendingInput {
    /// Whether there is room for more.
    pub(crate) fn has_room(&self) -> bool {
        self.bytes.len() < INPUT_WINDOW
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.end != End::Pending
    }

    /// Adds bytes. Nothing follows the end.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.end == End::Open {
            self.bytes.extend(bytes);
        }
    }

    pub(crate) fn end(&mut self) {
        if self.end == End::Open {
            self.end = End::Pending;
        }
    }

    /// Forgets what waits: nobody takes it any more.
    pub(crate) fn discard(&mut self) {
        *self = Self {
            bytes: VecDeque::new(),
            end: End::Sent,
        };
    }

    /// Takes what fits into a message, and at most `max` bytes.
    pub(crate) fn take(&mut self, max: u64) -> Option<Piece> {
        if self.bytes.is_empty() {
            let is_end = self.end == End::Pending;
            return is_end.then(|| {
                self.end = End::Sent;
                Piece::End
            });
        }
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        let len = self.bytes.len().min(max).min(CHUNK);
        (len > 0).then(|| Piece::Bytes(self.bytes.drain(..len).collect()))
    }
}
