//! Checkpoints of VMs, and rewinding them.

use army_api::checkpoints::{Checkpoint, Checkpoints, Rewind, Rewound, TakeCheckpoint};
use army_api::keys::Role;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::auth::Caller;
use super::extract::{Body, Path};
use super::{Answer, App};

/// Takes a checkpoint of a VM: a state that the VM can be set back to. The VM itself continues to run.
///
/// A checkpoint holds what has changed since the checkpoint that the VM is at. Checkpoints exist as
/// long as the VM runs: while it has some it is not suspended, and an idle policy that would suspend
/// it pauses it. A suspended VM is woken.
#[utoipa::path(post, path = "/v1/vms/{vm}/checkpoints", params(("vm" = String, Path)),
    request_body = TakeCheckpoint, responses((status = 201, body = Checkpoint)))]
pub(super) async fn take(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(request): Body<TakeCheckpoint>,
) -> Answer<(StatusCode, Json<Checkpoint>)> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    let taken = app.controller.checkpoint(&vm, request).await?;
    Ok((StatusCode::CREATED, Json(taken)))
}

/// Lists the checkpoints of a VM.
#[utoipa::path(get, path = "/v1/vms/{vm}/checkpoints", params(("vm" = String, Path)),
    responses((status = 200, body = Checkpoints)))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Checkpoints>> {
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.checkpoints(&vm).await?))
}

/// Removes a checkpoint of a VM, and returns the others.
///
/// The VM and its other checkpoints stay as they are.
#[utoipa::path(delete, path = "/v1/vms/{vm}/checkpoints/{name}",
    params(("vm" = String, Path), ("name" = String, Path)),
    responses((status = 200, body = Checkpoints)))]
pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path((vm, name)): Path<(String, String)>,
) -> Answer<Json<Checkpoints>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.remove_checkpoint(&vm, &name).await?))
}

/// Sets a VM back to one of its checkpoints, in place: memory, CPUs, devices and disks.
///
/// What has happened since is lost, unless another checkpoint was taken of it. Commands, terminals and
/// forwarded ports of the VM end. The guest's clock is set to the present time.
#[utoipa::path(post, path = "/v1/vms/{vm}/rewind", params(("vm" = String, Path)),
    request_body = Rewind, responses((status = 200, body = Rewound)))]
pub(super) async fn rewind(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(request): Body<Rewind>,
) -> Answer<Json<Rewound>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.rewind(&vm, request).await?))
}
