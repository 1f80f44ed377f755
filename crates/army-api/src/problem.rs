//! Failures, as RFC 9457 problem documents.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The kind of a failure, for programs. New kinds may be added; existing ones are never renamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// The request cannot be parsed, or a value in it is not allowed.
    InvalidRequest,
    /// The request has no key, or an unknown one.
    Unauthorized,
    /// The role of the key does not permit the request.
    Forbidden,
    /// The object does not exist, or it belongs to another tenant.
    NotFound,
    /// The state of the object does not allow the request, the object is in use, or its name is
    /// taken.
    Conflict,
    /// The idempotency key was used with a different request before.
    IdempotencyMismatch,
    /// The request exceeds a size limit.
    TooLarge,
    /// The request exceeds the quota of the tenant.
    QuotaExceeded,
    /// The server is overloaded, or no host has room. The request can be retried after
    /// `retry_after_s`.
    Busy,
    /// The guest does not respond.
    GuestUnavailable,
    /// The host does not respond, or no suitable host accepts VMs at the moment.
    HostUnavailable,
    /// No host, or not the one that the request is about, meets the requirements.
    HostUnsupported,
    /// The operation did not finish in time.
    Timeout,
    /// The server itself failed.
    Internal,
}

impl ProblemKind {
    /// The HTTP status code of a response with this kind of problem.
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::Conflict | Self::HostUnsupported => 409,
            Self::IdempotencyMismatch => 422,
            Self::TooLarge => 413,
            Self::QuotaExceeded | Self::Busy => 429,
            Self::GuestUnavailable | Self::HostUnavailable => 503,
            Self::Timeout => 504,
            Self::Internal => 500,
        }
    }

    /// The title of the kind, which is the same for every problem of this kind.
    fn title(self) -> &'static str {
        match self {
            Self::InvalidRequest => "The request is invalid",
            Self::Unauthorized => "A key is needed",
            Self::Forbidden => "The key does not allow this",
            Self::NotFound => "There is no such thing",
            Self::Conflict => "Its state does not allow this",
            Self::IdempotencyMismatch => "The idempotency key belongs to another request",
            Self::TooLarge => "The request is too large",
            Self::QuotaExceeded => "The quota is used up",
            Self::Busy => "There is no room now",
            Self::GuestUnavailable => "The guest does not answer",
            Self::HostUnavailable => "The host does not answer",
            Self::HostUnsupported => "No host can run it",
            Self::Timeout => "It took too long",
            Self::Internal => "The server failed",
        }
    }
}

/// A failure, as an RFC 9457 problem document (`application/problem+json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    /// The kind of the failure. As a URI reference in the sense of RFC 9457 it is relative, and the
    /// same on every server.
    #[serde(rename = "type")]
    pub kind: ProblemKind,
    /// A short title of the kind of failure. It is the same for every failure of this kind.
    pub title: String,
    /// The HTTP status code of the response.
    pub status: u16,
    /// An explanation of this particular failure.
    pub detail: String,
    /// What the client can do about the failure, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// The time after which to retry, in seconds. The `Retry-After` header has the same value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u32>,
    /// The limit that was reached, where the request was refused because of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<ReachedLimit>,
}

/// A limit that was reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReachedLimit {
    /// The name of the limit, such as `sessions_per_vm`. The metrics have the same names.
    pub name: String,
    /// The value of the limit.
    pub value: u64,
}

impl Problem {
    /// Creates a problem of this kind, without advice.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            title: kind.title().to_owned(),
            status: kind.status(),
            detail: detail.into(),
            advice: None,
            retry_after_s: None,
            limit: None,
        }
    }

    /// Adds the limit that was reached.
    #[must_use]
    pub fn limited_by(mut self, name: impl Into<String>, value: u64) -> Self {
        self.limit = Some(ReachedLimit {
            name: name.into(),
            value,
        });
        self
    }

    /// Adds advice to the problem.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Adds the time after which to retry, in seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_written_as_rfc_9457_says() {
        let problem = Problem::new(ProblemKind::Busy, "no host has room").retry_after(2);
        assert_eq!(
            serde_json::to_string(&problem).unwrap(),
            r#"{"type":"busy","title":"There is no room now","status":429,"detail":"no host has room","retry_after_s":2}"#
        );
    }
}
