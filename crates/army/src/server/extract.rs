//! Extractors. A request that cannot be read is answered with a problem document.

use army_api::{Problem, ProblemKind};
use axum::body::Bytes;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{self, FromRequest, FromRequestParts, Json, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{App, BODY_LIMIT, Failure, MAX_BODY};

/// How much of a body that is too large is read and discarded, in bytes.
const MAX_DISCARDED: usize = 16 << 20;

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, app: &App) -> Result<Self, Failure> {
        let (parts, body) = request.into_parts();
        let Ok(read) = tokio::time::timeout(BODY_LIMIT, read(body)).await else {
            let detail = "the request body was not received in time";
            return Err(Failure(Problem::new(ProblemKind::Timeout, detail)));
        };
        let bytes = Bytes::from(read?);
        let request = Request::from_parts(parts.clone(), bytes.clone().into());
        let value = match Json::<T>::from_request(request, app).await {
            Ok(Json(value)) => value,
            Err(rejection) => return Err(Failure(unreadable(&rejection))),
        };
        // The limits are those of the document, so they are checked on the body as it was sent.
        let sent: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        app.bounds.check_body(&parts, &sent)?;
        Ok(Self(value))
    }
}

/// Reads a body. A body that is too large is read and discarded for a while, because a client that is
/// still sending when the connection is closed does not see the response.
async fn read(body: axum::body::Body) -> Result<Vec<u8>, Problem> {
    let mut pieces = body.into_data_stream();
    let mut bytes = Vec::new();
    let mut len = 0;
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| {
            let detail = format!("the request body was cut off: {error}");
            Problem::new(ProblemKind::InvalidRequest, detail)
        })?;
        len += piece.len();
        if len <= MAX_BODY {
            bytes.extend_from_slice(&piece);
        } else if len > MAX_DISCARDED {
            break;
        }
    }
    if len > MAX_BODY {
        let detail = format!("the request body exceeds {MAX_BODY} bytes");
        return Err(Problem::new(ProblemKind::TooLarge, detail));
    }
    Ok(bytes)
}

fn unreadable(rejection: &JsonRejection) -> Problem {
    let kind = match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ProblemKind::TooLarge,
        _ => ProblemKind::InvalidRequest,
    };
    Problem::new(kind, rejection.body_text())
}

/// The parameters in the query of the URL.
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<App> for Params<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let read: Result<Query<T>, QueryRejection> = Query::from_request_parts(parts, app).await;
        match read {
            Ok(Query(value)) => {
                let sent = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri);
                let sent = sent.map_or_else(|_| Vec::new(), |Query(sent)| sent);
                let sent = sent
                    .iter()
                    .map(|(name, text)| (name.as_str(), text.as_str()));
                app.bounds.check_parameters(parts, "query", sent)?;
                Ok(Self(value))
            }
            Err(rejection) => Err(Failure(Problem::new(
                ProblemKind::InvalidRequest,
                rejection.body_text(),
            ))),
        }
    }
}

/// The parameters in the path.
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Path<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let read: Result<extract::Path<T>, PathRejection> =
            extract::Path::from_request_parts(parts, app).await;
        match read {
            Ok(extract::Path(value)) => {
                let sent = extract::RawPathParams::from_request_parts(parts, app).await;
                if let Ok(sent) = sent {
                    app.bounds.check_parameters(parts, "path", sent.iter())?;
                }
                Ok(Self(value))
            }
            Err(rejection) => Err(Failure(Problem::new(
                ProblemKind::InvalidRequest,
                rejection.body_text(),
            ))),
        }
    }
}

/// The upgrade of a request to a WebSocket.
pub(super) struct Upgrade(pub(super) WebSocketUpgrade);

impl FromRequestParts<App> for Upgrade {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        match WebSocketUpgrade::from_request_parts(parts, app).await {
            Ok(upgrade) => Ok(Self(upgrade)),
            Err(rejection) => Err(Failure(Problem::new(
                ProblemKind::InvalidRequest,
                format!(
                    "this path requires a WebSocket upgrade: {}",
                    rejection.body_text()
                ),
            ))),
        }
    }
}

/// The request's `Idempotency-Key`, where it has one.
pub(super) struct IdempotencyKey(pub(super) Option<String>);

impl FromRequestParts<App> for IdempotencyKey {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Failure> {
        let Some(value) = parts.headers.get("idempotency-key") else {
            return Ok(Self(None));
        };
        let key = value
            .to_str()
            .ok()
            .filter(|key| (1..=200).contains(&key.len()));
        match key {
            Some(key) => Ok(Self(Some(key.to_owned()))),
            None => Err(Failure(Problem::new(
                ProblemKind::InvalidRequest,
                "an Idempotency-Key must have 1 to 200 visible ASCII characters",
            ))),
        }
    }
}

pub(super) async fn no_such_path(request: Request) -> Failure {
    let detail = format!("no such path: {}", request.uri().path());
    Failure(Problem::new(ProblemKind::NotFound, detail).advise("GET /openapi.json lists all paths"))
}

pub(super) async fn no_such_method(request: Request) -> Failure {
    let detail = format!(
        "{} does not support {}",
        request.uri().path(),
        request.method()
    );
    let mut problem = Problem::new(ProblemKind::InvalidRequest, detail);
    problem.status = 405;
    Failure(problem)
}
