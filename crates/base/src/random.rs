//! Random bytes from the kernel, fit for secrets (getrandom(2)).

use std::fmt::Write as _;
use std::io;

use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

/// Fills `bytes`. Blocks only while the kernel has not yet been seeded after boot.
///
/// # Errors
/// The kernel's, which a filter of system calls may cause.
pub fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::rand::getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => bytes = &mut bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// `N` random bytes.
///
/// # Errors
/// The same as of [`fill`].
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

/// `N` random bytes as `2 * N` hexadecimal digits.
///
/// # Errors
/// The same as of [`fill`].
pub fn hex<const N: usize>() -> io::Result<String> {
    let mut text = String::with_capacity(2 * N);
    for byte in bytes::<N>()? {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_bytes_than_one_call_gives_are_all_random() {
        // One call gives no more than 32 MiB - 1, and 256 bytes where a signal arrives.
        let mut bytes = vec![0; 1 << 16];
        fill(&mut bytes).unwrap();
        for part in bytes.chunks(64) {
            assert!(part.iter().any(|byte| *byte != 0));
        }
    }

    #[test]
    fn hexadecimal_text_has_two_digits_a_byte() {
        let text = hex::<6>().unwrap();
        assert_eq!(text.len(), 12);
        assert!(text.bytes().all(|digit| digit.is_ascii_hexdigit()));
        assert_ne!(text, hex::<6>().unwrap());
    }
}
