//! Templates. In paths, a template is named by its name in the caller's own tenant or among the
//! templates of the administrators, or as `TENANT/NAME`, whose `/` is percent-encoded. How names are
//! looked up is in `army_controller`'s `store/template_names.rs`.

use std::time::Duration;

use army_api::keys::Role;
use army_api::operations::{Operation, Wait};
use army_api::templates::{
    ChangeTemplate, CopyTemplate, ImportTemplate, RegisterTemplate, SetTag, Template,
};
use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use futures_util::StreamExt;

use super::auth::Caller;
use super::extract::{Body, IdempotencyKey, Params, Path};
use super::operations::Waiting;
use super::{Answer, App, failure, operations};
use army_controller::ErrorKind;
use army_node_api::chunks;

/// How long the removal of a template is waited for, where the client does not say.
const REMOVAL_WAIT: Duration = Duration::from_secs(30);
/// The most bytes of a template that are in memory while it is sent or received.
const IN_TRANSIT: usize = 4 << 20;

/// Lists the templates that the caller can use: those of the own tenant, those that were shared with
/// it, and public ones. Administrators see all.
#[utoipa::path(get, path = "/v1/templates", responses((status = 200, body = Vec<Template>)))]
pub(super) async fn list(State(app): State<App>, caller: Caller) -> Answer<Json<Vec<Template>>> {
    let requester = caller.requester(None);
    Ok(Json(app.controller.templates(&requester).await?))
}

/// Registers a template that is in a host's store, as a public template of the administrators.
#[utoipa::path(post, path = "/v1/templates", request_body = RegisterTemplate,
    params(Wait, ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 201, body = Template), (status = 202, body = Operation)))]
pub(super) async fn register(
    State(app): State<App>,
    caller: Caller,
    IdempotencyKey(key): IdempotencyKey,
    waiting: Waiting,
    Body(request): Body<RegisterTemplate>,
) -> Answer<Response> {
    caller.may(Role::Admin)?;
    let requester = caller.requester(key);
    let started = app
        .controller
        .register_template(&requester, request)
        .await?;
    operations::answer(&app, started, waiting, StatusCode::CREATED).await
}

/// Returns one template, by its name or by a tag.
#[utoipa::path(get, path = "/v1/templates/{name}", params(("name" = String, Path)),
    responses((status = 200, body = Template)))]
pub(super) async fn inspect(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Json<Template>> {
    let requester = caller.requester(None);
    Ok(Json(app.controller.template(&requester, &name).await?))
}

/// Changes the number of standbys of a template, and who can use it.
///
/// Users change the templates of their own tenant. Only administrators make one public.
#[utoipa::path(patch, path = "/v1/templates/{name}", params(("name" = String, Path)), request_body = ChangeTemplate,
    responses((status = 200, body = Template)))]
pub(super) async fn change(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Body(request): Body<ChangeTemplate>,
) -> Answer<Json<Template>> {
    caller.may(Role::User)?;
    let requester = caller.requester(None);
    let changed = app.controller.change_template(&requester, &name, &request);
    Ok(Json(changed.await?))
}

/// Copies a template to another host.
#[utoipa::path(post, path = "/v1/templates/{name}/copies", params(("name" = String, Path), Wait,
    ("Idempotency-Key" = Option<String>, Header)), request_body = CopyTemplate,
    responses((status = 201, body = Template), (status = 202, body = Operation)))]
pub(super) async fn copy(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    IdempotencyKey(key): IdempotencyKey,
    waiting: Waiting,
    Body(request): Body<CopyTemplate>,
) -> Answer<Response> {
    caller.may(Role::Admin)?;
    let (controller, requester) = (&app.controller, caller.requester(key));
    let copied = controller.copy_template(&requester, &name, &request.host);
    operations::answer(&app, copied.await?, waiting, StatusCode::CREATED).await
}

/// Exports a template as one stream, in Army's own format, for another Army or as a backup. Whoever
/// can use a template can export it.
#[utoipa::path(get, path = "/v1/templates/{name}/content", params(("name" = String, Path)),
    responses((status = 200, content_type = "application/octet-stream")))]
pub(super) async fn export(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let reserved = app.budget.reserve(&caller.key.tenant, IN_TRANSIT)?;
    let requester = caller.requester(None);
    let content = app.controller.export_template(&requester, &name).await?;
    let response = failure::bytes(content, ErrorKind::Internal).await?;
    Ok(response.map(|body| {
        let content = body.into_data_stream().inspect(move |_| {
            let _ = &reserved;
        });
        axum::body::Body::from_stream(content)
    }))
}

/// Imports a template that was exported with `GET`.
///
/// The content is verified, and the template appears only when it is complete. It belongs to the
/// caller's tenant and is private; one of an administrator belongs to the administrators and is
/// public.
#[utoipa::path(put, path = "/v1/templates/{name}/content", params(("name" = String, Path),
    ImportTemplate, ("Idempotency-Key" = Option<String>, Header)),
    request_body(content_type = "application/octet-stream"),
    responses((status = 201, body = Template)))]
pub(super) async fn import(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Params(parameters): Params<ImportTemplate>,
    IdempotencyKey(key): IdempotencyKey,
    request: Request,
) -> Answer<(StatusCode, Json<Template>)> {
    caller.may(Role::User)?;
    let _reserved = app.budget.reserve(&caller.key.tenant, IN_TRANSIT)?;
    let content = chunks::receive(request.into_body().into_data_stream());
    let (controller, requester) = (&app.controller, caller.requester(key));
    let host = parameters.host.as_deref();
    let started = controller.import_template(&requester, &name, host, content);
    let output = controller.outcome(started.await?, None).await?;
    Ok((StatusCode::CREATED, Json(operations::template(output)?)))
}

/// Creates a tag that points to a template, or moves an existing tag to it. The tag belongs to the
/// tenant of the template, whose users and administrators can move it.
#[utoipa::path(put, path = "/v1/tags/{tag}", params(("tag" = String, Path)), request_body = SetTag,
    responses((status = 200, body = Template)))]
pub(super) async fn tag(
    State(app): State<App>,
    caller: Caller,
    Path(tag): Path<String>,
    Body(request): Body<SetTag>,
) -> Answer<Json<Template>> {
    caller.may(Role::User)?;
    let requester = caller.requester(None);
    let tagged = app.controller.tag(&requester, &tag, &request.template);
    Ok(Json(tagged.await?))
}

/// Removes a tag. The template that it points to is kept.
#[utoipa::path(delete, path = "/v1/tags/{tag}", params(("tag" = String, Path)),
    responses((status = 204)))]
pub(super) async fn untag(
    State(app): State<App>,
    caller: Caller,
    Path(tag): Path<String>,
) -> Answer<StatusCode> {
    caller.may(Role::User)?;
    let requester = caller.requester(None);
    app.controller.untag(&requester, &tag).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a template that is not in use, also from its hosts. Users remove those of their own
/// tenant.
///
/// From then on it cannot be used. A host that does not respond is waited for; if that takes longer
/// than 30 seconds, or than `wait`, the response is `202 Accepted`.
#[utoipa::path(delete, path = "/v1/templates/{name}", params(("name" = String, Path), Wait),
    responses((status = 204), (status = 202, body = Operation)))]
pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    waiting: Waiting,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let requester = caller.requester(None);
    let started = app.controller.remove_template(&requester, &name).await?;
    let waiting = waiting.or(REMOVAL_WAIT);
    operations::answer(&app, started, waiting, StatusCode::NO_CONTENT).await
}
