//! Tenants: their quotas and network policies.

use army_api::keys::Role;
use army_api::tenants::{ChangeTenant, Tenant};
use axum::Json;
use axum::extract::State;

use super::auth::Caller;
use super::extract::{Body, Path};
use super::{Answer, App};

/// Lists all tenants.
#[utoipa::path(get, path = "/v1/tenants", responses((status = 200, body = Vec<Tenant>)))]
pub(super) async fn list(State(app): State<App>, caller: Caller) -> Answer<Json<Vec<Tenant>>> {
    caller.may(Role::Admin)?;
    Ok(Json(app.controller.tenants().await?))
}

/// Returns one tenant. Only an administrator sees another tenant than the key's own.
#[utoipa::path(get, path = "/v1/tenants/{tenant}", params(("tenant" = String, Path)),
    responses((status = 200, body = Tenant)))]
pub(super) async fn inspect(
    State(app): State<App>,
    caller: Caller,
    Path(tenant): Path<String>,
) -> Answer<Json<Tenant>> {
    if tenant != caller.key.tenant {
        caller.may(Role::Admin)?;
    }
    Ok(Json(app.controller.tenant(&tenant).await?))
}

/// Changes the quotas and the network policy of a tenant.
///
/// The quotas are for VMs that are created from now on. The policy is in force for VMs that are
/// created, forked, changed or resumed from now on.
#[utoipa::path(patch, path = "/v1/tenants/{tenant}", params(("tenant" = String, Path)),
    request_body = ChangeTenant, responses((status = 200, body = Tenant)))]
pub(super) async fn change(
    State(app): State<App>,
    caller: Caller,
    Path(tenant): Path<String>,
    Body(request): Body<ChangeTenant>,
) -> Answer<Json<Tenant>> {
    caller.may(Role::Admin)?;
    Ok(Json(app.controller.change_tenant(&tenant, &request).await?))
}
