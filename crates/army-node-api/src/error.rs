//! Errors of nodes. They travel from a node to the controller, and know nothing of HTTP.

use agent_proto::error::ClientError;
use clone_api::ApiError;
use serde::{Deserialize, Serialize};

/// A result of the contract.
pub type Result<T> = std::result::Result<T, Error>;

/// The kind of an [`Error`], for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// A value of the request is not allowed.
    InvalidRequest,
    /// The peer may not ask for this, or the guest's user may not do it.
    PermissionDenied,
    /// The VM, the template or the file does not exist.
    NotFound,
    /// The state of the object does not permit the request, or its name is taken.
    Conflict,
    /// The content exceeds a size limit.
    TooLarge,
    /// The host or the guest has run out of a resource.
    Exhausted,
    /// The guest or its VM process does not respond.
    GuestUnavailable,
    /// The host, or another host that it needs, does not respond.
    HostUnreachable,
    /// The host lacks a feature that the VM needs; another host may have it.
    HostUnsupported,
    /// The call is of an older epoch of the host than the node has seen: another controller has taken
    /// the host over.
    StaleEpoch,
    /// The deadline of the call has passed.
    DeadlineExceeded,
    /// The node itself failed. An unknown kind, which a newer node may send, is read as this one.
    #[serde(other)]
    Internal,
}

/// An error of a node, or of the connection to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind of the error.
    pub kind: ErrorKind,
    /// What failed, on what, and why, in a sentence for people.
    pub message: String,
    /// What the caller can do about it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Error {
    /// Creates an error without advice.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            advice: None,
        }
    }

    /// Adds advice to the error.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// An [`ErrorKind::Internal`] error: this process cannot do `action`.
    pub fn internal(action: &str, cause: &dyn std::fmt::Display) -> Self {
        Self::new(ErrorKind::Internal, format!("cannot {action}: {cause}"))
    }

    /// The deadline of a call has passed.
    pub fn deadline_exceeded() -> Self {
        Self::new(
            ErrorKind::DeadlineExceeded,
            "the operation did not finish before its deadline",
        )
    }
}

/// What ends a connection to an agent.
const LOST: &str = "the VM ended, its guest rebooted, or it was rewound to a checkpoint";

impl From<ClientError> for Error {
    /// Describes a failed exchange with a guest's agent.
    fn from(error: ClientError) -> Self {
        use agent_proto::messages::ErrorCode;
        let kind = match &error {
            ClientError::Refused(refused) => match refused.code() {
                ErrorCode::Invalid | ErrorCode::Unsupported => ErrorKind::InvalidRequest,
                ErrorCode::NotFound => ErrorKind::NotFound,
                ErrorCode::Denied => ErrorKind::PermissionDenied,
                ErrorCode::Exhausted => ErrorKind::Exhausted,
                ErrorCode::Other => ErrorKind::GuestUnavailable,
            },
            ClientError::TooLong { .. } => ErrorKind::InvalidRequest,
            _ => ErrorKind::GuestUnavailable,
        };
        match error {
            ClientError::Lost(_) => Self::new(kind, format!("{error} ({LOST})")),
            error => Self::new(kind, error.to_string()),
        }
    }
}

impl From<ApiError> for Error {
    /// Describes a failure of Clone. Its advice is for people at the host's shell, and left out.
    fn from(error: ApiError) -> Self {
        use clone_api::ErrorCode;
        let kind = match error.code {
            ErrorCode::BadRequest | ErrorCode::InvalidConfig | ErrorCode::MethodNotAllowed => {
                ErrorKind::InvalidRequest
            }
            ErrorCode::NotFound => ErrorKind::NotFound,
            ErrorCode::Conflict => ErrorKind::Conflict,
            ErrorCode::TooLarge => ErrorKind::TooLarge,
            ErrorCode::Unavailable => ErrorKind::GuestUnavailable,
            ErrorCode::Timeout => ErrorKind::DeadlineExceeded,
            ErrorCode::HostUnsupported => ErrorKind::HostUnsupported,
            ErrorCode::OutOfSpace => ErrorKind::Exhausted,
            ErrorCode::Internal => ErrorKind::Internal,
        };
        Self::new(kind, error.message)
    }
}

impl From<clone_api::ClientError> for Error {
    /// Describes a failed request to a VM's control socket.
    fn from(error: clone_api::ClientError) -> Self {
        match error {
            clone_api::ClientError::Refused(error) => error.into(),
            other => Self::new(ErrorKind::GuestUnavailable, other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_newer_node_is_read() {
        let text = r#"{"kind":"of_the_future","message":"no","more":1}"#;
        let error: Error = serde_json::from_str(text).unwrap();
        assert_eq!(error, Error::new(ErrorKind::Internal, "no"));
        let text = serde_json::to_string(&Error::new(ErrorKind::NotFound, "no")).unwrap();
        assert_eq!(text, r#"{"kind":"not_found","message":"no"}"#);
    }
}
