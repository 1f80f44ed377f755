//! Errors of the controller. They know nothing of HTTP: whoever serves the API converts them.

use agent_proto::error::ClientError;
use army_node_api::ErrorKind as NodeErrorKind;
use serde::{Deserialize, Serialize};

/// A result of the controller.
pub type Result<T> = std::result::Result<T, Error>;

/// When a request that a host could not serve is worth repeating, in seconds.
pub(crate) const RETRY_S: u32 = 5;

/// The kind of an [`Error`], for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// A value of the request is not allowed.
    InvalidRequest,
    /// The credentials are unknown or have expired.
    Unauthenticated,
    /// The caller, or the guest's user, may not do this.
    Forbidden,
    /// The object does not exist, or belongs to another tenant.
    NotFound,
    /// The state of the object does not permit the request, or its name is taken.
    Conflict,
    /// The idempotency key was used with a different request before.
    IdempotencyMismatch,
    /// The content exceeds a size limit.
    TooLarge,
    /// The request exceeds the tenant's quota.
    QuotaExceeded,
    /// There is no capacity for the request at the moment.
    Busy,
    /// The guest does not respond.
    GuestUnavailable,
    /// The host does not respond, or no suitable host accepts VMs at the moment.
    HostUnavailable,
    /// No host, or not the one that the request is about, can run the VM.
    HostUnsupported,
    /// The operation did not finish in time.
    Timeout,
    /// Another controller has taken over from this one, which ends.
    Superseded,
    /// The controller itself failed.
    Internal,
}

/// Why the controller did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind of the error.
    pub kind: ErrorKind,
    /// What failed, on what, and why, in a sentence for people.
    pub message: String,
    /// What the caller can do about it, where that is known.
    pub advice: Option<String>,
    /// When it is worth trying again, in seconds.
    pub retry_after_s: Option<u32>,
}

impl Error {
    /// Creates an error without advice.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            advice: None,
            retry_after_s: None,
        }
    }

    /// Adds advice to the error.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Adds the time after which to try again, in seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }
}

impl From<army_node_api::Error> for Error {
    fn from(error: army_node_api::Error) -> Self {
        let kind = match error.kind {
            NodeErrorKind::InvalidRequest => ErrorKind::InvalidRequest,
            NodeErrorKind::PermissionDenied => ErrorKind::Forbidden,
            NodeErrorKind::NotFound => ErrorKind::NotFound,
            NodeErrorKind::Conflict => ErrorKind::Conflict,
            NodeErrorKind::TooLarge => ErrorKind::TooLarge,
            NodeErrorKind::Exhausted => ErrorKind::Busy,
            NodeErrorKind::GuestUnavailable => ErrorKind::GuestUnavailable,
            NodeErrorKind::HostUnreachable => ErrorKind::HostUnavailable,
            NodeErrorKind::HostUnsupported => ErrorKind::HostUnsupported,
            NodeErrorKind::StaleEpoch => ErrorKind::Superseded,
            NodeErrorKind::DeadlineExceeded => ErrorKind::Timeout,
            NodeErrorKind::Internal => ErrorKind::Internal,
        };
        Self {
            kind,
            message: error.message,
            advice: error.advice,
            retry_after_s: (kind == ErrorKind::HostUnavailable).then_some(RETRY_S),
        }
    }
}

impl From<ClientError> for Error {
    /// Describes a failed exchange with a guest's agent.
    fn from(error: ClientError) -> Self {
        army_node_api::Error::from(error).into()
    }
}
