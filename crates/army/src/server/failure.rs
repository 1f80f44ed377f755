//! Failures as responses. This is the one place where an error of the controller becomes a problem
//! document, and gets its HTTP status.

use std::io;

use army_api::vms::{CreatedVms, Failure as FailedVm};
use army_api::{Problem, ProblemKind};
use army_controller::{Error, ErrorKind};
use army_node_api::chunks::{self, ChunkReceiver};
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;

/// A problem as a response.
pub struct Failure(pub Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(problem(error))
    }
}

impl From<army_node_api::Error> for Failure {
    fn from(error: army_node_api::Error) -> Self {
        Error::from(error).into()
    }
}

/// An error of the controller as a problem document.
pub(super) fn problem(error: Error) -> Problem {
    let kind = match error.kind {
        ErrorKind::InvalidRequest => ProblemKind::InvalidRequest,
        ErrorKind::Unauthenticated => ProblemKind::Unauthorized,
        ErrorKind::Forbidden => ProblemKind::Forbidden,
        ErrorKind::NotFound => ProblemKind::NotFound,
        ErrorKind::Conflict => ProblemKind::Conflict,
        ErrorKind::IdempotencyMismatch => ProblemKind::IdempotencyMismatch,
        ErrorKind::TooLarge => ProblemKind::TooLarge,
        ErrorKind::QuotaExceeded => ProblemKind::QuotaExceeded,
        ErrorKind::Busy => ProblemKind::Busy,
        ErrorKind::GuestUnavailable => ProblemKind::GuestUnavailable,
        // Another controller answers when the request is repeated.
        ErrorKind::HostUnavailable | ErrorKind::Superseded => ProblemKind::HostUnavailable,
        ErrorKind::HostUnsupported => ProblemKind::HostUnsupported,
        ErrorKind::Timeout => ProblemKind::Timeout,
        ErrorKind::Internal => ProblemKind::Internal,
    };
    let mut problem = Problem::new(kind, error.message);
    problem.advice = error.advice;
    problem.retry_after_s = error.retry_after_s;
    problem
}

/// Created VMs with problem documents for those that could not be created.
pub(super) fn created_vms(created: army_controller::CreatedVms) -> CreatedVms {
    let failures = created.failures.into_iter().map(|failure| FailedVm {
        name: failure.name,
        problem: problem(failure.error),
    });
    CreatedVms {
        vms: created.vms,
        failures: failures.collect(),
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(status = status.as_u16(), problem = %self.0, "a request failed");
        }
        let retry = self.0.retry_after_s;
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        let kind = header::HeaderValue::from_static("application/problem+json");
        headers.insert(header::CONTENT_TYPE, kind);
        if let Some(seconds) = retry {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if status == StatusCode::UNAUTHORIZED {
            let scheme = header::HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, scheme);
            // Strangers do not keep connections.
            let close = header::HeaderValue::from_static("close");
            headers.insert(header::CONNECTION, close);
        }
        response
    }
}

/// A response of bytes. The first chunk, or an error in its place, decides on the status.
///
/// # Errors
/// The controller's error that is the first item; another error there is one of `kind`.
pub(super) async fn bytes(
    mut content: ChunkReceiver,
    kind: ErrorKind,
) -> Result<Response, Failure> {
    let first = match content.recv().await {
        Some(Err(error)) => return Err(of_stream(error, kind).into()),
        first => first,
    };
    let rest = chunks::into_stream(content);
    let body = Body::from_stream(futures_util::stream::iter(first).chain(rest));
    let media = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((media, body).into_response())
}

fn of_stream(error: io::Error, kind: ErrorKind) -> Error {
    let text = error.to_string();
    match error.into_inner().map(|inner| inner.downcast::<Error>()) {
        Some(Ok(error)) => *error,
        _ => Error::new(kind, text),
    }
}
