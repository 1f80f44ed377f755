//! Templates.

use army_api::keys::Role;
use army_api::templates::{
    ChangeTemplate, CopyTemplate, ImportTemplate, RegisterTemplate, SetTag, Template,
};
use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::auth::Caller;
use super::extract::{Body, Params, Path};
use super::{Answer, App, failure};
use army_controller::ErrorKind;
use army_node_api::chunks;

/// Lists all templates.
#[utoipa::path(get, path = "/v1/templates", responses((status = 200, body = Vec<Template>)))]
pub(super) async fn list(State(app): State<App>, _: Caller) -> Answer<Json<Vec<Template>>> {
    Ok(Json(app.controller.templates().await?))
}

/// Registers a template that is in a host's store.
#[utoipa::path(post, path = "/v1/templates", request_body = RegisterTemplate,
    responses((status = 201, body = Template)))]
pub(super) async fn register(
    State(app): State<App>,
    caller: Caller,
    Body(request): Body<RegisterTemplate>,
) -> Answer<(StatusCode, Json<Template>)> {
    caller.may(Role::Admin)?;
    let template = app.controller.register_template(&request).await?;
    Ok((StatusCode::CREATED, Json(template)))
}

/// Returns one template.
#[utoipa::path(get, path = "/v1/templates/{name}", params(("name" = String, Path)),
    responses((status = 200, body = Template)))]
pub(super) async fn inspect(
    State(app): State<App>,
    _: Caller,
    Path(name): Path<String>,
) -> Answer<Json<Template>> {
    Ok(Json(app.controller.template(&name).await?))
}

/// Changes the number of standbys of a template.
#[utoipa::path(patch, path = "/v1/templates/{name}", params(("name" = String, Path)), request_body = ChangeTemplate,
    responses((status = 200, body = Template)))]
pub(super) async fn change(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Body(request): Body<ChangeTemplate>,
) -> Answer<Json<Template>> {
    caller.may(Role::Admin)?;
    let template = app.controller.set_standbys(&name, request.standbys).await?;
    Ok(Json(template))
}

/// Copies a template to another host.
#[utoipa::path(post, path = "/v1/templates/{name}/copies", params(("name" = String, Path)), request_body = CopyTemplate,
    responses((status = 201, body = Template)))]
pub(super) async fn copy(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Body(request): Body<CopyTemplate>,
) -> Answer<(StatusCode, Json<Template>)> {
    caller.may(Role::Admin)?;
    let template = app.controller.copy_template(&name, &request.host).await?;
    Ok((StatusCode::CREATED, Json(template)))
}

/// Exports a template as one stream, in Army's own format, for another Army or as a backup.
#[utoipa::path(get, path = "/v1/templates/{name}/content", params(("name" = String, Path)),
    responses((status = 200, content_type = "application/octet-stream")))]
pub(super) async fn export(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Response> {
    caller.may(Role::Admin)?;
    let content = app.controller.export_template(&name).await?;
    failure::bytes(content, ErrorKind::Internal).await
}

/// Imports a template that was exported with `GET`.
///
/// The content is verified, and the template appears only when it is complete.
#[utoipa::path(put, path = "/v1/templates/{name}/content", params(("name" = String, Path), ImportTemplate),
    request_body(content_type = "application/octet-stream"),
    responses((status = 201, body = Template)))]
pub(super) async fn import(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Params(parameters): Params<ImportTemplate>,
    request: Request,
) -> Answer<(StatusCode, Json<Template>)> {
    caller.may(Role::Admin)?;
    let content = chunks::receive(request.into_body().into_data_stream());
    let template = app
        .controller
        .import_template(&name, parameters.host.as_deref(), content)
        .await?;
    Ok((StatusCode::CREATED, Json(template)))
}

/// Creates a tag that points to a template, or moves an existing tag to it.
#[utoipa::path(put, path = "/v1/tags/{tag}", params(("tag" = String, Path)), request_body = SetTag,
    responses((status = 200, body = Template)))]
pub(super) async fn tag(
    State(app): State<App>,
    caller: Caller,
    Path(tag): Path<String>,
    Body(request): Body<SetTag>,
) -> Answer<Json<Template>> {
    caller.may(Role::Admin)?;
    Ok(Json(app.controller.tag(&tag, &request.template).await?))
}

/// Removes a tag. The template that it points to is kept.
#[utoipa::path(delete, path = "/v1/tags/{tag}", params(("tag" = String, Path)),
    responses((status = 204)))]
pub(super) async fn untag(
    State(app): State<App>,
    caller: Caller,
    Path(tag): Path<String>,
) -> Answer<StatusCode> {
    caller.may(Role::Admin)?;
    app.controller.untag(&tag).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a template that is not in use, also from its hosts.
#[utoipa::path(delete, path = "/v1/templates/{name}", params(("name" = String, Path)),
    responses((status = 204)))]
pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<StatusCode> {
    caller.may(Role::Admin)?;
    app.controller.remove_template(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
