//! Templates.

use army_api::Problem;
use army_api::keys::Role;
use army_api::templates::{ChangeTemplate, CopyTemplate, RegisterTemplate, Template};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::auth::Caller;
use super::extract::Body;
use super::{Answer, App};

/// All templates.
#[utoipa::path(get, path = "/v1/templates", responses((status = 200, body = Vec<Template>), (status = "4XX", body = Problem)))]
pub(super) async fn list(State(app): State<App>, _: Caller) -> Answer<Json<Vec<Template>>> {
    Ok(Json(app.controller.templates().await?))
}

/// Takes up a template that a host has.
#[utoipa::path(post, path = "/v1/templates", request_body = RegisterTemplate,
    responses((status = 201, body = Template), (status = "4XX", body = Problem)))]
pub(super) async fn register(
    State(app): State<App>,
    caller: Caller,
    Body(asked): Body<RegisterTemplate>,
) -> Answer<(StatusCode, Json<Template>)> {
    caller.may(Role::Admin)?;
    let template = app.controller.register(&asked).await?;
    Ok((StatusCode::CREATED, Json(template)))
}

/// One template.
#[utoipa::path(get, path = "/v1/templates/{name}", params(("name" = String, Path)),
    responses((status = 200, body = Template), (status = "4XX", body = Problem)))]
pub(super) async fn inspect(
    State(app): State<App>,
    _: Caller,
    Path(name): Path<String>,
) -> Answer<Json<Template>> {
    Ok(Json(app.controller.template(&name).await?))
}

/// Changes how many clones of a template are kept ready.
#[utoipa::path(patch, path = "/v1/templates/{name}", params(("name" = String, Path)), request_body = ChangeTemplate,
    responses((status = 200, body = Template), (status = "4XX", body = Problem)))]
pub(super) async fn change(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Body(asked): Body<ChangeTemplate>,
) -> Answer<Json<Template>> {
    caller.may(Role::Admin)?;
    let template = app.controller.set_standbys(&name, asked.standbys).await?;
    Ok(Json(template))
}

/// Takes a template to another host.
#[utoipa::path(post, path = "/v1/templates/{name}/copies", params(("name" = String, Path)), request_body = CopyTemplate,
    responses((status = 201, body = Template), (status = "4XX", body = Problem)))]
pub(super) async fn copy(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Body(asked): Body<CopyTemplate>,
) -> Answer<(StatusCode, Json<Template>)> {
    caller.may(Role::Admin)?;
    let template = app.controller.copy_template(&name, &asked.host).await?;
    Ok((StatusCode::CREATED, Json(template)))
}

/// Removes a template that nobody uses, from its hosts too.
#[utoipa::path(delete, path = "/v1/templates/{name}", params(("name" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<StatusCode> {
    caller.may(Role::Admin)?;
    app.controller.remove_template(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
