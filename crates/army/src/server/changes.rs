//! Changes of VMs that exist.

use army_api::changes::ChangeVm;
use army_api::keys::Role;
use army_api::vms::Vm;
use axum::Json;
use axum::extract::State;

use super::auth::Caller;
use super::extract::{Body, Path};
use super::{Answer, App, egress};

/// Changes the lifetime, the idle policy, the network policy or the labels of a VM.
///
/// What is not mentioned is kept. A VM that has ended, or ends during the request, is answered with
/// a conflict: after a success, the former lifetime or idle policy does not end it any more. Where
/// the VM's host does not answer, the change is recorded, and applied when the host answers again.
#[utoipa::path(patch, path = "/v1/vms/{vm}", params(("vm" = String, Path)), request_body = ChangeVm,
    responses((status = 200, body = Vm)))]
pub(super) async fn change(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(request): Body<ChangeVm>,
) -> Answer<Json<Vm>> {
    caller.may(Role::User)?;
    egress::check(&caller, request.network.as_ref())?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.change_vm(&vm, &request).await?))
}
