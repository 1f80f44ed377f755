//! Names and secrets that nobody can guess.

use army_api::{Problem, ProblemKind};

/// `N` random bytes in hexadecimal.
pub(crate) fn hex<const N: usize>() -> Result<String, Problem> {
    let mut bytes = [0; N];
    // Up to 256 bytes come whole.
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(
        |error| Problem::new(ProblemKind::Internal, format!("no random numbers: {error}")),
    )?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
