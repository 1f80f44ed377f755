//! Hosts.

use army_api::hosts::Host;
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::Json;
use axum::extract::{Path, State};

use super::auth::Caller;
use super::{Answer, App};

/// All hosts.
#[utoipa::path(get, path = "/v1/hosts", responses((status = 200, body = Vec<Host>), (status = "4XX", body = Problem)))]
pub(super) async fn list(State(app): State<App>, _: Caller) -> Answer<Json<Vec<Host>>> {
    Ok(Json(app.controller.hosts().await?))
}

/// One host.
#[utoipa::path(get, path = "/v1/hosts/{name}", params(("name" = String, Path)),
    responses((status = 200, body = Host), (status = "4XX", body = Problem)))]
pub(super) async fn inspect(
    State(app): State<App>,
    _: Caller,
    Path(name): Path<String>,
) -> Answer<Json<Host>> {
    Ok(Json(find(&app, &name).await?))
}

/// Takes a host out of placement. Its VMs go on.
#[utoipa::path(post, path = "/v1/hosts/{name}/drain", params(("name" = String, Path)),
    responses((status = 200, body = Host), (status = "4XX", body = Problem)))]
pub(super) async fn drain(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Json<Host>> {
    set(&app, &caller, &name, true).await
}

/// Puts a host back into placement.
#[utoipa::path(post, path = "/v1/hosts/{name}/undrain", params(("name" = String, Path)),
    responses((status = 200, body = Host), (status = "4XX", body = Problem)))]
pub(super) async fn undrain(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Json<Host>> {
    set(&app, &caller, &name, false).await
}

async fn set(app: &App, caller: &Caller, name: &str, draining: bool) -> Answer<Json<Host>> {
    caller.may(Role::Admin)?;
    app.controller.store.drain_host(name, draining).await?;
    Ok(Json(find(app, name).await?))
}

async fn find(app: &App, name: &str) -> Answer<Host> {
    let hosts = app.controller.hosts().await?;
    let found = hosts.into_iter().find(|host| host.name == name);
    Ok(found.ok_or_else(|| {
        let detail = format!("there is no host `{}`", name.escape_debug());
        Problem::new(ProblemKind::NotFound, detail)
    })?)
}
