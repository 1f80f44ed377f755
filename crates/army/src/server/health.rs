//! The state of the server, which is the only request that requires no key.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Answer, App};

#[derive(Serialize, ToSchema)]
pub(super) struct Health {
    /// The version of the server.
    version: &'static str,
}

/// Reports whether the server and its database are available.
///
/// This request requires no key.
#[utoipa::path(get, path = "/healthz", security(()), responses((status = 200, body = Health)))]
pub(super) async fn health(State(app): State<App>) -> Answer<Json<Health>> {
    app.controller.check_database().await?;
    Ok(Json(Health {
        version: env!("CARGO_PKG_VERSION"),
    }))
}
