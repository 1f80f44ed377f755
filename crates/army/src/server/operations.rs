//! Operations, and the responses of requests whose work is one.

use std::time::Duration;

use army_api::operations::{MAX_WAIT_S, Operation, OperationFilter, OperationPage, Wait};
use army_api::{Problem, ProblemKind};
use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::auth::Caller;
use super::extract::{Params, Path};
use super::failure::{Failure, created_vms, problem};
use super::{Answer, App};
use army_controller::{Output, StartedOperation};

/// Lists operations, one page at a time, the newest first. Users see those of their own tenant;
/// administrators see all.
#[utoipa::path(get, path = "/v1/operations", params(OperationFilter),
    responses((status = 200, body = OperationPage)))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Params(filter): Params<OperationFilter>,
) -> Answer<Json<OperationPage>> {
    let (operations, next) = app.controller.operations(&filter, caller.scope()).await?;
    let operations = operations.into_iter().map(described).collect();
    Ok(Json(OperationPage { operations, next }))
}

/// Returns one operation, and what it has made.
///
/// With `wait`, the response is sent when the operation has ended, or after that time.
#[utoipa::path(get, path = "/v1/operations/{id}", params(("id" = String, Path), Wait),
    responses((status = 200, body = Operation)))]
pub(super) async fn inspect(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    Params(wait): Params<Wait>,
) -> Answer<Json<Operation>> {
    let limit = Duration::from_secs(wait.wait.unwrap_or(0).min(MAX_WAIT_S));
    let operation = app.controller.operation(&id, caller.scope(), limit).await?;
    // A key that is restricted to some objects sees what it has requested, and nothing else.
    if caller.key.scope.is_some() && operation.actor != caller.key.id {
        let detail = format!("operation `{}` not found", id.escape_debug());
        return Err(Problem::new(ProblemKind::NotFound, detail).into());
    }
    Ok(Json(described(operation)))
}

/// How long a request waits for its operation; `None` until it has ended. It is said by the query
/// parameter `wait`, or by the header `Prefer` as in `respond-async, wait=10` (RFC 7240).
pub(super) struct Waiting(Option<Duration>);

impl FromRequestParts<App> for Waiting {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let Params(Wait { wait }) = Params::from_request_parts(parts, app).await?;
        let seconds = wait.or_else(|| preferred_wait(parts));
        Ok(Self(
            seconds.map(|wait| Duration::from_secs(wait.min(MAX_WAIT_S))),
        ))
    }
}

impl Waiting {
    /// Whether the request says how long it waits.
    pub(super) fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    /// The same, where a request that does not say otherwise waits for `limit`.
    pub(super) fn or(self, limit: Duration) -> Self {
        Self(Some(self.0.unwrap_or(limit)))
    }
}

/// The time that a `Prefer` header requests, in seconds. Preferences that are not understood have no
/// effect.
fn preferred_wait(parts: &Parts) -> Option<u64> {
    let values = parts.headers.get_all("prefer").iter();
    let values = values.filter_map(|value| value.to_str().ok());
    let preferences = values.flat_map(|value| value.split([',', ';']));
    let preferences: Vec<String> = preferences
        .map(|it| it.trim().to_ascii_lowercase())
        .collect();
    let wait = preferences.iter().find_map(|it| {
        let (name, value) = it.split_once('=')?;
        (name.trim() == "wait").then(|| value.trim().parse().ok())?
    });
    let is_async = preferences.iter().any(|it| it == "respond-async");
    is_async.then(|| wait.unwrap_or(0))
}

/// The response to a request whose operation has begun: what it has made, with `status`, or, where it
/// has not ended in time, the operation.
pub(super) async fn answer(
    app: &App,
    started: StartedOperation,
    waiting: Waiting,
    status: StatusCode,
) -> Answer<Response> {
    let id = started.id.clone();
    match app.controller.outcome(started, waiting.0).await? {
        Some(output) => Ok(finished(status, output)),
        None => {
            let operation = app.controller.operation(&id, None, Duration::ZERO).await?;
            let location = [(header::LOCATION, format!("/v1/operations/{id}"))];
            let body = Json(described(operation));
            Ok((StatusCode::ACCEPTED, location, body).into_response())
        }
    }
}

fn finished(status: StatusCode, output: Output) -> Response {
    match output {
        Output::Vms(created) => (status, Json(created_vms(created))).into_response(),
        Output::Template(template) => (status, Json(*template)).into_response(),
        Output::Host(host) => (status, Json(*host)).into_response(),
        Output::Moved(moved) => (status, Json(*moved)).into_response(),
        Output::Json(text) => {
            let media = [(header::CONTENT_TYPE, "application/json")];
            (status, media, text).into_response()
        }
        Output::Nothing => StatusCode::NO_CONTENT.into_response(),
    }
}

/// An operation in the API's terms.
fn described(operation: army_controller::Operation) -> Operation {
    let mut described = Operation {
        id: operation.id,
        tenant: operation.tenant,
        kind: operation.kind,
        state: operation.state,
        subject: operation.subject,
        actor: operation.actor,
        created_ms: operation.created_ms,
        updated_ms: operation.updated_ms,
        ended_ms: operation.ended_ms,
        progress: operation.progress,
        created: None,
        template: None,
        host: None,
        moved: None,
        problem: operation.error.map(problem),
    };
    match operation.output {
        Some(Output::Vms(created)) => described.created = Some(created_vms(created)),
        Some(Output::Template(template)) => described.template = Some(*template),
        Some(Output::Host(host)) => described.host = Some(*host),
        Some(Output::Moved(moved)) => described.moved = Some(*moved),
        Some(Output::Json(_) | Output::Nothing) | None => {}
    }
    described
}

/// The template that an operation has made.
pub(super) fn template(output: Option<Output>) -> Result<army_api::templates::Template, Problem> {
    match output {
        Some(Output::Template(template)) => Ok(*template),
        _ => {
            let detail = "the operation has ended without a template";
            Err(Problem::new(ProblemKind::Internal, detail))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preference_to_wait_is_understood_with_respond_async_only() {
        let wait = |prefer: &str| {
            let request = axum::http::Request::builder().header("Prefer", prefer);
            preferred_wait(&request.body(()).unwrap().into_parts().0)
        };
        assert_eq!(wait("respond-async"), Some(0));
        assert_eq!(wait("respond-async, wait=10"), Some(10));
        assert_eq!(wait("Respond-Async; wait=x"), Some(0));
        assert_eq!(wait("wait=10"), None);
        assert_eq!(wait("return=minimal"), None);
    }
}
