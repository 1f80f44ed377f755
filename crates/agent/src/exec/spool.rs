//! One output stream of a command: the bytes that were printed and not yet acknowledged.
//!
//! Positions are counted in bytes since the command's start. `start ≤ sent ≤ end`: bytes before
//! `start` are gone, bytes before `sent` were sent to the present host, bytes before `end` were
//! printed. Bytes before `acknowledged` take no room: they are gone, or are kept for later readers
//! until there is newer output.

use std::collections::VecDeque;

/// See the module.
pub(super) struct Spool {
    bytes: VecDeque<u8>,
    start: u64,
    acknowledged: u64,
    sent: u64,
    capacity: usize,
    /// Whether output that was acknowledged is kept, too.
    keeps: bool,
    closed: bool,
}

impl Spool {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            start: 0,
            acknowledged: 0,
            sent: 0,
            capacity,
            keeps: false,
            closed: false,
        }
    }

    /// A spool that always has the newest output, acknowledged or not.
    pub(super) fn keeping(capacity: usize) -> Self {
        Self {
            keeps: true,
            ..Self::new(capacity)
        }
    }

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// The number of bytes that may be added.
    pub(super) fn room(&self) -> usize {
        self.capacity - (self.end() - self.acknowledged) as usize
    }

    /// Adds printed bytes, at most [`Spool::room`].
    pub(super) fn push(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= self.room());
        self.bytes.extend(bytes);
        self.drop_before(self.end().saturating_sub(self.capacity as u64));
    }

    /// Drops the bytes before a position.
    fn drop_before(&mut self, position: u64) {
        let count = position.saturating_sub(self.start) as usize;
        self.bytes.drain(..count);
        self.start += count as u64;
        self.sent = self.sent.max(self.start);
    }

    /// Makes room for `len` more bytes by dropping the oldest, acknowledged or not.
    pub(super) fn drop_oldest_for(&mut self, len: usize) {
        let excess = len.saturating_sub(self.room()) as u64;
        self.acknowledged = (self.acknowledged + excess).min(self.end());
        if !self.keeps {
            self.drop_before(self.acknowledged);
        }
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
        self.acknowledged = self.acknowledged.max(cursor);
        if self.keeps {
            return;
        }
        self.drop_before(cursor);
        if self.bytes.is_empty() {
            // An idle command keeps no buffer.
            self.bytes.shrink_to_fit();
        }
    }

    /// Attaches a host that has everything before `cursor`: sending continues from there, or from
    /// the oldest byte that is kept.
    pub(super) fn rewind(&mut self, cursor: u64) {
        self.sent = cursor.clamp(self.start, self.end());
        // The command waits for this host, which may read again what another one has read.
        self.acknowledged = self.sent;
        if !self.keeps {
            self.drop_before(self.sent);
        }
    }

    /// A piece from `cursor` on, or from the oldest byte that is kept, with its position, for a
    /// reader beside the host; `None` if there is nothing new.
    pub(super) fn peek(&self, cursor: u64, max: usize) -> Option<(u64, Vec<u8>)> {
        let cursor = cursor.max(self.start);
        let from = usize::try_from(cursor - self.start).ok()?;
        let len = self.bytes.len().checked_sub(from)?.min(max);
        (len > 0).then(|| {
            let data = self.bytes.range(from..from + len).copied().collect();
            (cursor, data)
        })
    }

    /// Whether all was printed, and a reader has everything up to `cursor`.
    pub(super) fn is_finished_at(&self, cursor: u64) -> bool {
        self.closed && cursor >= self.end()
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
    fn a_keeping_spool_has_the_newest_for_every_reader_and_waits_for_its_host() {
        let mut spool = Spool::keeping(4);
        spool.push(b"abcd");
        assert_eq!(
            (spool.next(9), spool.room()),
            (Some((0, b"abcd".to_vec())), 0)
        );
        assert_eq!(spool.peek(1, 2), Some((1, b"bc".to_vec())));
        spool.acknowledge(4);
        spool.push(b"ef");
        // Another reader gets what is left.
        assert_eq!(spool.peek(0, 9), Some((2, b"cdef".to_vec())));
        assert_eq!(spool.next(9), Some((4, b"ef".to_vec())));
        spool.rewind(0);
        assert_eq!(
            (spool.room(), spool.next(9)),
            (0, Some((2, b"cdef".to_vec())))
        );
        spool.close();
        assert!(spool.is_finished_at(6) && !spool.is_finished_at(5));
        spool.acknowledge(6);
        assert_eq!(spool.peek(6, 9), None);
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
