//! One output stream of a command: the bytes that were printed and not yet acknowledged.
//!
//! Positions are counted in bytes since the command's start. `start ≤ sent ≤ end`: bytes before
//! `start` were acknowledged, bytes before `sent` were sent to the present host, bytes before `end`
//! were printed.

use std::collections::VecDeque;

/// See the module.
pub(super) struct Spool {
    bytes: VecDeque<u8>,
    start: u64,
    sent: u64,
    capacity: usize,
    closed: bool,
}

impl Spool {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            start: 0,
            sent: 0,
            capacity,
            closed: false,
        }
    }

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// The number of bytes that may be added.
    pub(super) fn room(&self) -> usize {
        self.capacity - self.bytes.len()
    }

    /// Adds printed bytes, at most [`Spool::room`].
    pub(super) fn push(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= self.room());
        self.bytes.extend(bytes);
    }

    /// Makes room for `len` more bytes by dropping the oldest, acknowledged or not.
    pub(super) fn drop_oldest_for(&mut self, len: usize) {
        let excess = len.saturating_sub(self.room()).min(self.bytes.len());
        self.bytes.drain(..excess);
        self.start += excess as u64;
        self.sent = self.sent.max(self.start);
    }

    /// Marks the end of the output.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Whether all was printed and sent.
    pub(super) fn is_finished(&self) -> bool {
        self.closed && self.sent == self.end()
    }

    /// Records that everything before `cursor` has arrived. A `cursor` beyond what was sent is
    /// ignored.
    pub(super) fn acknowledge(&mut self, cursor: u64) {
        if cursor > self.sent {
            return;
        }
        let arrived = cursor.saturating_sub(self.start) as usize;
        self.bytes.drain(..arrived);
        self.start += arrived as u64;
        if self.bytes.is_empty() {
            // An idle command keeps no buffer.
            self.bytes.shrink_to_fit();
        }
    }

    /// Attaches a host that has everything before `cursor`: sending continues from there, or from
    /// the oldest byte that is kept.
    pub(super) fn rewind(&mut self, cursor: u64) {
        self.sent = cursor.clamp(self.start, self.end());
    }

    /// The next piece to send, with its position; `None` if there is nothing new.
    pub(super) fn next(&mut self, max: usize) -> Option<(u64, Vec<u8>)> {
        let from = (self.sent - self.start) as usize;
        let len = (self.bytes.len() - from).min(max);
        if len == 0 {
            return None;
        }
        let data = self.bytes.range(from..from + len).copied().collect();
        let cursor = self.sent;
        self.sent += len as u64;
        Some((cursor, data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_not_acknowledged_is_sent_again_after_a_rewind() {
        let mut spool = Spool::new(100);
        spool.push(b"hello world");
        assert_eq!(spool.next(5), Some((0, b"hello".to_vec())));
        assert_eq!(spool.next(100), Some((5, b" world".to_vec())));
        spool.acknowledge(3);
        spool.rewind(3);
        assert_eq!(spool.next(100), Some((3, b"lo world".to_vec())));
        spool.close();
        assert!(spool.is_finished());
    }

    #[test]
    fn a_detached_spool_keeps_the_newest() {
        let mut spool = Spool::new(4);
        spool.push(b"abcd");
        spool.drop_oldest_for(2);
        spool.push(b"ef");
        assert_eq!(spool.next(100), Some((2, b"cdef".to_vec())));
    }

    #[test]
    fn a_host_cannot_acknowledge_what_it_was_not_sent() {
        let mut spool = Spool::new(4);
        spool.push(b"abcd");
        spool.acknowledge(4);
        assert_eq!(spool.room(), 0);
    }

    proptest! {
        #[test]
        fn bytes_arrive_once_and_in_order_whatever_is_lost(
            steps in prop::collection::vec((0u8..4, 1usize..9), 1..200),
        ) {
            let mut spool = Spool::new(16);
            let (mut printed, mut arrived) = (Vec::new(), Vec::new());
            for (step, size) in steps {
                match step {
                    0 => {
                        let bytes: Vec<u8> = (0..size.min(spool.room())).map(|i| (printed.len() + i) as u8).collect();
                        spool.push(&bytes);
                        printed.extend(bytes);
                    }
                    1 => if let Some((cursor, data)) = spool.next(size) {
                        prop_assert_eq!(cursor, arrived.len() as u64);
                        arrived.extend(data);
                    },
                    2 => spool.acknowledge(arrived.len() as u64),
                    // A connection is lost with a piece under way; the next host says what it has.
                    _ => { spool.next(size); spool.rewind(arrived.len() as u64); }
                }
            }
            while let Some((_, data)) = spool.next(3) { arrived.extend(data); }
            prop_assert_eq!(printed, arrived);
        }
    }
}
