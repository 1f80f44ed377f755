//! Copies files so that zero blocks take no space, and blocks are shared where possible.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::ZEROS;

/// The size of the copy buffer, for hosts that cannot copy within the kernel.
pub(crate) const CHUNK: usize = 1 << 20;
/// The granularity of holes: the block size of nearly all file systems.
const BLOCK: usize = ZEROS.len();

/// Copies the whole of `from` into `to`, an empty file.
///
/// # Errors
/// The host's.
pub fn copy_file(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    to.set_len(len)?;
    // On some file systems, the whole file can be cloned at once.
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let mut at = 0;
    while at < len {
        let start = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(start))?;
        copy_range(from, start, to, start, end - start)?;
        at = end;
    }
    Ok(())
}

/// Copies bytes into a part of `to` that exists and has no data yet, sharing blocks if the file
/// system can.
///
/// # Errors
/// The host's error, or `UnexpectedEof` if `from` is shorter.
pub(crate) fn copy_range(
    from: &File,
    from_at: u64,
    to: &File,
    to_at: u64,
    len: u64,
) -> io::Result<()> {
    let (mut from_at, mut to_at, mut left) = (from_at, to_at, len);
    while left > 0 {
        let part = left.min(1 << 30) as usize;
        // The call advances both offsets.
        match rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), part) {
            Ok(count) if count > 0 => left -= count as u64,
            // The call does not work across file systems, or on some kinds of them.
            Ok(_) | Err(_) => return copy_through(from, from_at, to, to_at, left),
        }
    }
    Ok(())
}

/// Copies through a buffer. A file system that cannot copy may not report holes either, so zero
/// blocks are detected here.
fn copy_through(from: &File, from_at: u64, to: &File, to_at: u64, len: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK.min(len as usize)];
    let mut done = 0;
    while done < len {
        let part = (len - done).min(CHUNK as u64) as usize;
        from.read_exact_at(&mut buffer[..part], from_at + done)?;
        write(to, &buffer[..part], to_at + done)?;
        done += part as u64;
    }
    Ok(())
}

/// Writes those blocks of `bytes` that are not zero into a part of `to` that exists and has no data
/// yet.
pub(crate) fn write(to: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let mut start = 0;
    while start < bytes.len() {
        let blocks = bytes[start..].chunks(BLOCK);
        let zero: usize = blocks
            .clone()
            .take_while(|block| is_zero(block))
            .map(<[u8]>::len)
            .sum();
        let blocks = bytes[start + zero..].chunks(BLOCK);
        let data: usize = blocks
            .take_while(|block| !is_zero(block))
            .map(<[u8]>::len)
            .sum();
        start += zero;
        to.write_all_at(&bytes[start..start + data], at + start as u64)?;
        start += data;
    }
    Ok(())
}

/// Whether a block, which may be shorter at the end, is all zero.
fn is_zero(block: &[u8]) -> bool {
    block == &ZEROS[..block.len()]
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// Blocks by their letter, zeros for a dot; the last one is short.
    fn pattern(letters: &str) -> Vec<u8> {
        let blocks = letters.bytes().map(|letter| match letter {
            b'.' => [0; BLOCK],
            letter => [letter; BLOCK],
        });
        let mut bytes = blocks.collect::<Vec<_>>().concat();
        bytes.truncate(bytes.len() - 100);
        bytes
    }

    fn file_of(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_is_copied_by_hand_is_the_same_and_zeros_take_no_space() {
        for letters in ["a", ".", "ab..c", "..a..", "a.b.c.", ".a.b.c"] {
            let bytes = pattern(letters);
            let (from, to) = (file_of(&bytes), tempfile::tempfile().unwrap());
            to.set_len(bytes.len() as u64).unwrap();
            copy_through(&from, 0, &to, 0, bytes.len() as u64).unwrap();
            assert!(content(&to) == bytes, "{letters}");
            let data = letters.bytes().filter(|letter| *letter != b'.').count();
            // In units of 512 bytes.
            assert!(
                to.metadata().unwrap().blocks() <= 8 * data as u64,
                "{letters}"
            );
        }
    }

    #[test]
    fn a_file_is_copied_with_its_length_and_from_any_place() {
        let bytes = pattern("ab..c...");
        let (from, to) = (file_of(&bytes), tempfile::tempfile().unwrap());
        copy_file(&from, &to).unwrap();
        assert!(content(&to) == bytes);
        let part = tempfile::tempfile().unwrap();
        part.set_len(5000).unwrap();
        copy_range(&from, 1000, &part, 0, 5000).unwrap();
        assert!(content(&part) == bytes[1000..6000]);
        let short = copy_range(&from, bytes.len() as u64 - 10, &part, 0, 20);
        assert_eq!(short.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
