//! The console's log: two files that together keep the latest output, up to a limit.
//!
//! Both are open from the start, since a jailed process opens no files. When the current one holds
//! half the limit, its content replaces the content of the old one, and it is emptied. So
//! `console.log` always ends with the latest output.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The size of the copy buffer.
const CHUNK: usize = 4096;

/// The log of one console.
pub struct ConsoleLog {
    current: File,
    length: u64,
    old: File,
    old_length: u64,
    limit: u64,
}

impl ConsoleLog {
    /// Makes an empty log in two empty files, which must be open for reading and writing.
    pub fn new(current: File, old: File, limit: u64) -> Self {
        Self {
            current,
            length: 0,
            old,
            old_length: 0,
            limit,
        }
    }

    /// Appends output.
    pub(super) fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let half = (self.limit / 2).max(1);
        while !bytes.is_empty() {
            if self.length >= half {
                self.rotate()?;
            }
            let room = usize::try_from(half - self.length).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(bytes.len().min(room));
            self.current.write_all_at(now, self.length)?;
            self.length += now.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// The last `count` bytes, or all if there are fewer.
    pub(super) fn latest(&self, count: u64) -> io::Result<Vec<u8>> {
        let from_current = count.min(self.length);
        let from_old = (count - from_current).min(self.old_length);
        let mut bytes = vec![0; (from_old + from_current) as usize];
        let (old, current) = bytes.split_at_mut(from_old as usize);
        self.old.read_exact_at(old, self.old_length - from_old)?;
        self.current
            .read_exact_at(current, self.length - from_current)?;
        Ok(bytes)
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        let mut at = 0;
        while at < self.length {
            let count = (self.length - at).min(CHUNK as u64) as usize;
            self.current.read_exact_at(&mut chunk[..count], at)?;
            self.old.write_all_at(&chunk[..count], at)?;
            at += count as u64;
        }
        self.old.set_len(at)?;
        self.old_length = at;
        self.current.set_len(0)?;
        self.length = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log(limit: u64) -> ConsoleLog {
        let file = || tempfile::tempfile().unwrap();
        ConsoleLog::new(file(), file(), limit)
    }

    proptest! {
        #[test]
        fn the_log_keeps_the_latest_output_within_its_limit(
            limit in 2_u64..200,
            writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..12),
        ) {
            let mut log = log(limit);
            let mut all = Vec::new();
            for write in &writes {
                log.append(write).unwrap();
                all.extend_from_slice(write);
                let kept = log.latest(u64::MAX).unwrap();
                prop_assert!(kept.len() as u64 <= limit);
                prop_assert!(all.ends_with(&kept));
                // At least half the limit, or everything.
                prop_assert!(kept.len() == all.len() || kept.len() as u64 >= limit / 2);
                prop_assert!(log.latest(10).unwrap().len() <= 10);
                prop_assert!(all.ends_with(&log.latest(10).unwrap()));
            }
        }
    }

    #[test]
    fn the_current_file_ends_with_the_latest_output() {
        let mut log = log(20);
        log.append(b"0123456789abc").unwrap();
        assert_eq!(log.current.metadata().unwrap().len(), 3);
        assert_eq!(log.old.metadata().unwrap().len(), 10);
        assert_eq!(log.latest(5).unwrap(), b"89abc");
    }
}
