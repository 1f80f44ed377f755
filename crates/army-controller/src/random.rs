//! Ids and secrets that cannot be guessed.

use crate::{Error, ErrorKind, Result};

/// `N` random bytes in hexadecimal.
pub(crate) fn hex<const N: usize>() -> Result<String> {
    clone_base::random::hex::<N>().map_err(|error| {
        let message = format!("cannot get random numbers: {error}");
        Error::new(ErrorKind::Internal, message)
    })
}

/// A number from 0 to 1 that differs from call to call, for jitter. It is not secret, and 0.5 where
/// the kernel has no random numbers.
pub(crate) fn fraction() -> f64 {
    match clone_base::random::bytes() {
        Ok(bytes) => f64::from(u16::from_le_bytes(bytes)) / f64::from(u16::MAX),
        Err(_) => 0.5,
    }
}
