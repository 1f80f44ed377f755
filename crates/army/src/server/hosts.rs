//! Hosts.

use army_api::hosts::{ChangeHost, CreateJoinToken, Host, JoinToken};
use army_api::keys::Role;
use army_api::operations::{Operation, Wait};
use army_api::{Problem, ProblemKind};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;

use super::auth::Caller;
use super::extract::{Body, IdempotencyKey, Path};
use super::operations::Waiting;
use super::{Answer, App, operations};

/// How long a token is valid where the client does not say, in minutes.
const TOKEN_MINUTES: u32 = 15;
/// The longest time that a token can be valid, in minutes.
const MAX_TOKEN_MINUTES: u32 = 24 * 60;

/// Lists all hosts. Users see their names, states and labels; administrators see all of them.
#[utoipa::path(get, path = "/v1/hosts", responses((status = 200, body = Vec<Host>)))]
pub(super) async fn list(State(app): State<App>, caller: Caller) -> Answer<Json<Vec<Host>>> {
    let hosts = app.controller.hosts().await?.into_iter();
    Ok(Json(hosts.map(|host| visible(&caller, host)).collect()))
}

/// Returns one host. Users see its name, state and labels; administrators see all of it.
#[utoipa::path(get, path = "/v1/hosts/{name}", params(("name" = String, Path)),
    responses((status = 200, body = Host)))]
pub(super) async fn inspect(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Json<Host>> {
    let host = app.controller.host(&name).await?;
    Ok(Json(visible(&caller, host)))
}

/// What a caller may see of a host.
fn visible(caller: &Caller, host: Host) -> Host {
    match caller.may(Role::Admin) {
        Ok(()) => host,
        Err(_) => host.for_users(),
    }
}

/// Excludes a host from placement. Its VMs continue to run.
#[utoipa::path(post, path = "/v1/hosts/{name}/drain", params(("name" = String, Path), Wait),
    responses((status = 200, body = Host), (status = 202, body = Operation)))]
pub(super) async fn drain(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    waiting: Waiting,
) -> Answer<Response> {
    set(&app, &caller, &name, true, waiting).await
}

/// Includes a drained host in placement again.
#[utoipa::path(post, path = "/v1/hosts/{name}/undrain", params(("name" = String, Path), Wait),
    responses((status = 200, body = Host), (status = 202, body = Operation)))]
pub(super) async fn undrain(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    waiting: Waiting,
) -> Answer<Response> {
    set(&app, &caller, &name, false, waiting).await
}

/// Evacuates a host: excludes it from placement, and moves all of its VMs to other hosts, a few at a
/// time.
///
/// Each VM is moved by an operation of its own. The evacuation fails if VMs stay, and says which and
/// why; the host stays excluded from placement in any case.
#[utoipa::path(post, path = "/v1/hosts/{name}/evacuate", params(("name" = String, Path), Wait,
    ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 200, body = Host), (status = 202, body = Operation)))]
pub(super) async fn evacuate(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    IdempotencyKey(key): IdempotencyKey,
    waiting: Waiting,
) -> Answer<Response> {
    caller.may(Role::Admin)?;
    let requester = caller.requester(key);
    let started = app.controller.evacuate_host(&requester, &name).await?;
    operations::answer(&app, started, waiting, StatusCode::OK).await
}

async fn set(
    app: &App,
    caller: &Caller,
    name: &str,
    draining: bool,
    waiting: Waiting,
) -> Answer<Response> {
    caller.may(Role::Admin)?;
    let requester = caller.requester(None);
    let started = app.controller.set_draining(&requester, name, draining);
    operations::answer(app, started.await?, waiting, StatusCode::OK).await
}

/// Changes the labels of a host.
#[utoipa::path(patch, path = "/v1/hosts/{name}", params(("name" = String, Path)), request_body = ChangeHost,
    responses((status = 200, body = Host)))]
pub(super) async fn change(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Body(request): Body<ChangeHost>,
) -> Answer<Json<Host>> {
    caller.may(Role::Admin)?;
    Ok(Json(app.controller.change_host(&name, &request).await?))
}

/// Creates a token with which one host can join, once.
///
/// A repetition with the same `Idempotency-Key` makes no other token, and is a conflict.
#[utoipa::path(post, path = "/v1/join-tokens", request_body = CreateJoinToken,
    params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = 201, body = JoinToken)))]
pub(super) async fn token(
    State(app): State<App>,
    caller: Caller,
    IdempotencyKey(key): IdempotencyKey,
    Body(request): Body<CreateJoinToken>,
) -> Answer<(StatusCode, Json<JoinToken>)> {
    caller.may(Role::Admin)?;
    let minutes = request.minutes.unwrap_or(TOKEN_MINUTES);
    if !(1..=MAX_TOKEN_MINUTES).contains(&minutes) {
        let detail = format!("`minutes` must be 1 to {MAX_TOKEN_MINUTES}");
        return Err(Problem::new(ProblemKind::InvalidRequest, detail).into());
    }
    let requester = caller.requester(key);
    let created = app.controller.create_join_token(&requester, minutes);
    let (token, expires_ms) = created.await?;
    let token = token.to_string();
    Ok((StatusCode::CREATED, Json(JoinToken { token, expires_ms })))
}

/// Removes a host.
///
/// The host must have no VMs, or be unreachable, in which case its VMs are marked as failed.
#[utoipa::path(delete, path = "/v1/hosts/{name}", params(("name" = String, Path)),
    responses((status = 204)))]
pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<StatusCode> {
    caller.may(Role::Admin)?;
    app.controller.remove_host(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
