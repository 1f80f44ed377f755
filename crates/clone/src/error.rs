//! Failures as the command tells them: the API's own error type, which carries the advice.

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
