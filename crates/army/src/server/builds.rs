//! Templates that are built from others.

use army_api::builds::{BuildEvent, BuildTemplate};
use army_api::keys::Role;
use army_api::operations::{Operation, Wait};
use army_api::templates::Template;
use army_api::{Problem, ProblemKind};
use army_controller::Actor;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use tokio::sync::mpsc;

use super::auth::Caller;
use super::events::sent_events;
use super::extract::{Body, IdempotencyKey};
use super::operations::Waiting;
use super::{Answer, App, failure, operations};

/// The number of events that may wait for a slow reader, before the guest has to wait.
const AHEAD: usize = 4;

/// Builds a template from another one.
///
/// Forks the base template, runs the steps in the clone, and stores the result as a template that
/// contains only the changes. The response reports the progress as server-sent events; it is an
/// error if the build cannot start. The build goes on if the client disconnects: its operation tells
/// how it ended. With `wait`, the response has no progress: it is the template, or, after that time,
/// the operation.
#[utoipa::path(post, path = "/v1/builds", request_body = BuildTemplate,
    params(Wait, ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 200, body = BuildEvent, content_type = "text/event-stream"),
        (status = 201, body = Template), (status = 202, body = Operation)))]
pub(super) async fn build(
    State(app): State<App>,
    caller: Caller,
    IdempotencyKey(key): IdempotencyKey,
    waiting: Waiting,
    Body(request): Body<BuildTemplate>,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let requester = caller.requester(key);
    if waiting.is_limited() {
        let started = app.controller.build(&requester, request, None).await?;
        return operations::answer(&app, started, waiting, StatusCode::CREATED).await;
    }
    let (listener, mut events) = mpsc::channel(AHEAD);
    let progress = Some(listener.clone());
    let started = app.controller.build(&requester, request, progress).await?;
    let work = async move {
        let built = app.controller.outcome(started, None).await;
        let built = built.map_err(failure::problem);
        let last = match built.and_then(operations::template) {
            Ok(template) => BuildEvent::Built {
                template: Box::new(template),
            },
            Err(problem) => BuildEvent::Failed { problem },
        };
        // A client that has disconnected does not want to know.
        let _ = listener.send(last).await;
    };
    tokio::spawn(Actor::current().carry(work));
    match events.recv().await {
        Some(BuildEvent::Failed { problem }) => Err(problem.into()),
        Some(first) => Ok(sent_events(Some(first), events).into_response()),
        None => {
            let detail = "the build ended without a result";
            Err(Problem::new(ProblemKind::Internal, detail).into())
        }
    }
}
