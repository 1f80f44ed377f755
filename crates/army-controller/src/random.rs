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
