//! The API's error type: a code for programs, a message and advice for people.

use serde::{Deserialize, Serialize};

/// What kind of failure an error is, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request could not be read as HTTP or as JSON of the right shape.
    BadRequest,
    /// The request was read and asks for something that cannot be.
    InvalidConfig,
    /// No such operation, or no such VM.
    NotFound,
    /// The operation exists with another method.
    MethodNotAllowed,
    /// The request is larger than what is read.
    TooLarge,
    /// Not in the VM's present state, or the name is taken.
    Conflict,
    /// The VM has no such device, or the guest's side of it is not running.
    Unavailable,
    /// The host lacks what is needed.
    HostUnsupported,
    /// Something did not happen in time.
    Timeout,
    /// The host has no room for what was to be written.
    OutOfSpace,
    /// Anything else that failed.
    Internal,
}

impl ErrorCode {
    /// The status of an HTTP answer with this error.
    pub fn http_status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::InvalidConfig => 422,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::TooLarge => 413,
            Self::Conflict => 409,
            Self::Unavailable => 503,
            Self::Timeout => 504,
            Self::OutOfSpace => 507,
            Self::HostUnsupported | Self::Internal => 500,
        }
    }
}

/// A failure: what it is, what happened, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[error("{message}")]
pub struct ApiError {
    /// What kind of failure it is.
    pub code: ErrorCode,
    /// What was tried on what, and what went wrong.
    pub message: String,
    /// What to do about it; absent where nothing better is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl ApiError {
    /// An error without advice.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            advice: None,
        }
    }

    /// The same error with advice.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// An [`ErrorCode::Internal`] error that tells `error` and all its sources.
    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            // Many errors already end with their source's words.
            if !message.ends_with(&cause_text) {
                message.push_str(": ");
                message.push_str(&cause_text);
            }
            source = cause.source();
        }
        Self::new(ErrorCode::Internal, message)
    }
}
