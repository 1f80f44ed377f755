//! Keys, which administrators manage.

use army_api::keys::{CreateKey, Key, NewKey, Role};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::auth::Caller;
use super::extract::{Body, IdempotencyKey, Path};
use super::{Answer, App};

/// Lists all keys, without their secrets.
#[utoipa::path(get, path = "/v1/keys", responses((status = 200, body = Vec<Key>)))]
pub(super) async fn list(State(app): State<App>, caller: Caller) -> Answer<Json<Vec<Key>>> {
    caller.may(Role::Admin)?;
    Ok(Json(app.controller.keys().await?))
}

/// Creates a key.
///
/// The secret of the key is returned only in this response. A repetition with the same
/// `Idempotency-Key` makes no other key, and is a conflict that names the first one.
#[utoipa::path(post, path = "/v1/keys", request_body = CreateKey,
    params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = 201, body = NewKey)))]
pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    IdempotencyKey(key): IdempotencyKey,
    Body(request): Body<CreateKey>,
) -> Answer<(StatusCode, Json<NewKey>)> {
    caller.may(Role::Admin)?;
    let requester = caller.requester(key);
    let key = app.controller.create_requested_key(&requester, &request);
    Ok((StatusCode::CREATED, Json(key.await?)))
}

/// Revokes a key.
#[utoipa::path(delete, path = "/v1/keys/{id}", params(("id" = String, Path)),
    responses((status = 204)))]
pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    caller.may(Role::Admin)?;
    app.controller.remove_key(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
