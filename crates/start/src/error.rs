//! Helpers that make the API's error type, which carries advice for the user.

use std::error::Error;
use std::io;
use std::path::Path;

use clone_api::{ApiError, ErrorCode};

/// The result type of the launcher and the VM's process.
pub type Result<T> = std::result::Result<T, ApiError>;

/// Makes a closure for `map_err` that wraps an operating system error: `failed("open the kernel",
/// path)(error)`.
pub fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ApiError {
    move |error| {
        let message = format!("cannot {action} {}: {error}", path.display());
        match error.kind() {
            io::ErrorKind::PermissionDenied => ApiError::new(ErrorCode::Internal, message).advise(
                format!("give yourself access to {}, or run as root", path.display()),
            ),
            _ => ApiError::new(ErrorCode::Internal, message),
        }
    }
}

/// The error of a write to a disk, or to memory used as one; its code says whether the storage is
/// full.
pub fn storage_failed(error: &(dyn Error + 'static)) -> ApiError {
    let internal = ApiError::internal(error);
    match is_full(error) {
        true => ApiError {
            code: ErrorCode::OutOfSpace,
            ..internal
        },
        false => internal,
    }
}

/// Whether an error is caused by a full disk or quota.
fn is_full(error: &(dyn Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |cause: &&(dyn Error + 'static)| {
        (*cause).source()
    });
    causes
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        })
}
