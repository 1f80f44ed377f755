//! Webhooks.

use army_api::keys::Role;
use army_api::webhooks::{CreateWebhook, NewWebhook, Webhook};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::auth::Caller;
use super::extract::{Body, Path};
use super::{Answer, App};
use crate::webhooks::check_url;

/// Lists webhooks, without their secrets.
#[utoipa::path(get, path = "/v1/webhooks", responses((status = 200, body = Vec<Webhook>)))]
pub(super) async fn list(State(app): State<App>, caller: Caller) -> Answer<Json<Vec<Webhook>>> {
    caller.may(Role::User)?;
    Ok(Json(app.controller.webhooks(caller.scope()).await?))
}

/// Creates a webhook, which sends events from now on to a URL.
///
/// Each delivery is a `POST` with the event as JSON, and with the headers `army-webhook`,
/// `army-event` (the event's id), `army-delivery` (an id by which a repeated delivery is recognized:
/// the same each time that the event is sent to this webhook) and `army-signature`: `t=SECONDS,v1=HEX`,
/// where the number is the HMAC-SHA256, by the secret, of the seconds since 1970, a `.` and the body.
/// The secret is returned only in this response.
#[utoipa::path(post, path = "/v1/webhooks", request_body = CreateWebhook,
    responses((status = 201, body = NewWebhook)))]
pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    Body(request): Body<CreateWebhook>,
) -> Answer<(StatusCode, Json<NewWebhook>)> {
    caller.may(Role::User)?;
    let controller = &app.controller;
    let created = controller.create_webhook(caller.scope(), request, check_url);
    Ok((StatusCode::CREATED, Json(created.await?)))
}

/// Removes a webhook. What is being delivered may still arrive.
#[utoipa::path(delete, path = "/v1/webhooks/{id}", params(("id" = String, Path)),
    responses((status = 204)))]
pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    caller.may(Role::User)?;
    app.controller.remove_webhook(&id, caller.scope()).await?;
    Ok(StatusCode::NO_CONTENT)
}
