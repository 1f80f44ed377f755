//! Templates that are built from others.

use std::convert::Infallible;

use army_api::builds::{BuildEvent, BuildTemplate};
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::extract::State;
use axum::response::sse::{Event, Sse};
use futures_util::Stream;
use tokio::sync::mpsc;

use super::auth::Caller;
use super::events::sent_events;
use super::extract::Body;
use super::{Answer, App, failure};

/// The number of events that may wait for a slow reader, before the guest has to wait.
const AHEAD: usize = 4;

/// Builds a template from another one.
///
/// Forks the base template, runs the steps in the clone, and stores the result as a template that
/// contains only the changes. The response reports the progress as server-sent events; it is an
/// error if the build cannot start. If the client disconnects before the last event, the build is
/// cancelled and everything that it created is removed.
#[utoipa::path(post, path = "/v1/builds", request_body = BuildTemplate,
    responses((status = 200, body = BuildEvent, content_type = "text/event-stream")))]
pub(super) async fn build(
    State(app): State<App>,
    caller: Caller,
    Body(request): Body<BuildTemplate>,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>>>> {
    // Templates are visible to all tenants.
    caller.may(Role::Admin)?;
    let (listener, mut events) = mpsc::channel(AHEAD);
    // The build runs in a task of its own, which ends its VM where its client disconnects.
    tokio::spawn(async move {
        let tenant = &caller.key.tenant;
        let built = app.controller.build(tenant, request, &listener).await;
        let last = match built {
            Ok(template) => BuildEvent::Built { template },
            Err(error) => BuildEvent::Failed {
                problem: failure::problem(error),
            },
        };
        // A client that has disconnected does not want to know.
        let _ = listener.send(last).await;
    });
    match events.recv().await {
        Some(BuildEvent::Failed { problem }) => Err(problem.into()),
        Some(first) => Ok(sent_events(Some(first), events)),
        None => {
            let detail = "the build ended without a result";
            Err(Problem::new(ProblemKind::Internal, detail).into())
        }
    }
}
