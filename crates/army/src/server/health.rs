//! The state of the server. These are the only requests that require no key.

use army_api::{Problem, ProblemKind};
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

/// Reports whether the server does its work: its database is available, its hosts were asked for
/// their VMs, and its loops turn.
///
/// This request requires no key.
#[utoipa::path(get, path = "/readyz", security(()), responses((status = 200, body = Health)))]
pub(super) async fn ready(State(app): State<App>) -> Answer<Json<Health>> {
    if let Some(reason) = app.controller.unready() {
        // It is about the server, and not about a host.
        let mut problem = Problem::new(ProblemKind::Internal, reason);
        problem.status = 503;
        return Err(problem.into());
    }
    health(State(app)).await
}
