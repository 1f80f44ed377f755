//! Failures as the command tells them: the API's own error type, which carries the advice.

use std::error::Error;
use std::io;
use std::path::Path;

use clone_api::{ApiError, ErrorCode};

/// What everything in the command returns.
pub type Result<T> = std::result::Result<T, ApiError>;

/// Makes an error from the system's answer: `failed("open the kernel", path)(error)`.
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

/// The error of a write to a disk, or to memory that stands for one: of its own kind where that is
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

/// Whether a full disk or quota is behind an error.
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
