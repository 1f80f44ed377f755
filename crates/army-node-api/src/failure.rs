//! A problem as an answer of HTTP.

use std::io;

use army_api::{Problem, ProblemKind};
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;

use crate::pipe::{Pieces, body_of};

/// A failure as an answer.
pub struct Failure(pub Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self(problem)
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
        }
        response
    }
}

/// An answer of bytes. The first piece, or what is wrong, decides on its status.
///
/// # Errors
/// The problem that is the first piece; anything else there is one of `kind`.
pub async fn answer(mut pieces: Pieces, kind: ProblemKind) -> Result<Response, Problem> {
    let first = match pieces.recv().await {
        Some(Err(error)) => return Err(problem_of(error, kind)),
        first => first,
    };
    let body = Body::from_stream(futures_util::stream::iter(first).chain(body_of(pieces)));
    let media = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((media, body).into_response())
}

fn problem_of(error: io::Error, kind: ProblemKind) -> Problem {
    let text = error.to_string();
    match error.into_inner().map(|inner| inner.downcast::<Problem>()) {
        Some(Ok(problem)) => *problem,
        _ => Problem::new(kind, text),
    }
}
