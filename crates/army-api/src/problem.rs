//! Failures, as RFC 9457 problem documents.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What kind of failure it is, for programs. Kinds are added, never renamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// The request cannot be read, or asks for what cannot be.
    InvalidRequest,
    /// No key, or none that is known.
    Unauthorized,
    /// The key's role does not allow it.
    Forbidden,
    /// There is no such thing, or it is another tenant's.
    NotFound,
    /// It is in another state, in use, or its name is taken.
    Conflict,
    /// The same idempotency key came with another request before.
    IdempotencyMismatch,
    /// The request is larger than what is taken.
    TooLarge,
    /// The tenant's quota is used up.
    QuotaExceeded,
    /// Too much is going on, or no host has room: try again after `retry_after_s`.
    Busy,
    /// The guest does not answer.
    GuestUnavailable,
    /// The host does not answer, or those that could do it take no VMs now.
    HostUnavailable,
    /// No host, or not the one that it is about, has what it takes.
    HostUnsupported,
    /// Something did not happen in time.
    Timeout,
    /// A failure of the server itself.
    Internal,
}

impl ProblemKind {
    /// The status of an HTTP answer with it.
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

    /// A few words that are the same each time.
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

/// A failure: `application/problem+json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    /// What kind of failure it is: `tag:` and the kind would be the same for every server, so it is
    /// the kind alone, a relative reference.
    #[serde(rename = "type")]
    pub kind: ProblemKind,
    /// The kind in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What went wrong this time.
    pub detail: String,
    /// What to do about it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// When to try again, in seconds; the `Retry-After` header says the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u32>,
}

impl Problem {
    /// A problem of this kind.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            title: kind.title().to_owned(),
            status: kind.status(),
            detail: detail.into(),
            advice: None,
            retry_after_s: None,
        }
    }

    /// The same with advice.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// The same with a time to try again.
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
