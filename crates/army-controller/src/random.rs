//! Ids and secrets that cannot be guessed.

use crate::{Error, ErrorKind, Result};

/// `N` random bytes in hexadecimal.
pub(crate) fn hex<const N: usize>() -> Result<String> {
    let mut bytes = [0; N];
    // The kernel returns up to 256 bytes at once.
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(
        |error| {
            let message = format!("cannot get random numbers: {error}");
            Error::new(ErrorKind::Internal, message)
        },
    )?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A number from 0 to 1 that differs from call to call, for jitter. It is not secret, and 0.5 where
/// the kernel has no random numbers.
pub(crate) fn fraction() -> f64 {
    let mut bytes = [0; 2];
    let random = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    match random {
        Ok(_) => f64::from(u16::from_le_bytes(bytes)) / f64::from(u16::MAX),
        Err(_) => 0.5,
    }
}
