//! Bytes that wait to be sent, and their end.

use std::collections::VecDeque;

use agent_proto::{CHUNK, INPUT_WINDOW};

/// Bytes that wait to be sent.
#[derive(Debug, Default)]
pub(crate) struct PendingInput {
    bytes: VecDeque<u8>,
    end: End,
    /// The last bytes that were sent: all that may not have been received.
    sent: VecDeque<u8>,
    /// What was given up because the connection takes no more.
    unsent: VecDeque<u8>,
    /// Whether the end was given up, too.
    is_ended: bool,
    /// The number of bytes that were sent, and of those that former connections have sent.
    sent_bytes: u64,
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
        match self.end {
            End::Open => self.bytes.extend(bytes),
            // The connection takes no more; another one may.
            _ if !self.is_ended && self.unsent.len() < INPUT_WINDOW => self.unsent.extend(bytes),
            _ => {}
        }
    }

    pub(crate) fn end(&mut self) {
        self.is_ended = true;
        if self.end == End::Open {
            self.end = End::Pending;
        }
    }

    /// Forgets what waits: nobody takes it any more.
    pub(crate) fn discard(&mut self) {
        self.unsent.extend(self.bytes.drain(..));
        self.end = End::Sent;
    }

    /// Begins after what former connections have sent.
    pub(crate) fn after(received: u64) -> Self {
        Self {
            sent_bytes: received,
            ..Self::default()
        }
    }

    /// The input of a connection that goes on where another one was lost, of which so many bytes have
    /// been received. What has not been is sent again.
    pub(crate) fn resumed(former: Self, received: u64) -> Self {
        let lost = former.sent_bytes.saturating_sub(received);
        let lost = usize::try_from(lost).unwrap_or(usize::MAX);
        let skipped = former.sent.len().saturating_sub(lost);
        let mut bytes: VecDeque<u8> = former.sent.into_iter().skip(skipped).collect();
        bytes.extend(former.unsent);
        bytes.extend(former.bytes);
        Self {
            bytes,
            end: match former.is_ended {
                false => End::Open,
                true => End::Pending,
            },
            is_ended: former.is_ended,
            ..Self::after(received)
        }
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
        (len > 0).then(|| {
            let bytes: Vec<u8> = self.bytes.drain(..len).collect();
            self.sent.extend(&bytes);
            // More is never sent than the window without an answer.
            let known = self.sent.len().saturating_sub(INPUT_WINDOW);
            self.sent.drain(..known);
            self.sent_bytes = self.sent_bytes.saturating_add(len as u64);
            Piece::Bytes(bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(input: &mut PendingInput, max: u64) -> Vec<u8> {
        match input.take(max) {
            Some(Piece::Bytes(bytes)) => bytes,
            _ => Vec::new(),
        }
    }

    #[test]
    fn what_a_lost_connection_did_not_deliver_is_sent_again_and_nothing_twice() {
        let mut input = PendingInput::after(10);
        input.push(b"abcdef");
        assert_eq!(sent(&mut input, 4), b"abcd");
        // The connection takes no more, and more comes.
        input.discard();
        input.push(b"gh");
        input.end();
        // Of what was sent, two bytes were received.
        let mut again = PendingInput::resumed(input, 12);
        assert_eq!(sent(&mut again, 100), b"cdefgh");
        assert!(matches!(again.take(100), Some(Piece::End)));
        // All was received, but perhaps not the end.
        let mut again = PendingInput::resumed(again, 18);
        assert!(matches!(again.take(100), Some(Piece::End)));
        let mut open = PendingInput::resumed(PendingInput::after(5), 5);
        assert!(open.take(100).is_none());
        open.push(b"x");
        assert_eq!(sent(&mut open, 100), b"x");
    }
}
