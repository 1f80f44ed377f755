//! Moving VMs to other hosts.

use army_api::keys::Role;
use army_api::moves::{MigrateVm, MovedVm};
use army_api::operations::{Operation, Wait};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;

use super::auth::Caller;
use super::extract::{Body, IdempotencyKey, Path};
use super::operations::Waiting;
use super::{Answer, App, operations};

/// Moves a VM to another host while it runs. Only administrators may do that.
///
/// The guest goes on there after a pause of an instant, with its memory, its disks and its identity.
/// Commands through Army go on; terminals, forwarded ports, and the guest's own connections through the
/// host's network, end. A paused or suspended VM runs while it is moved, and is paused or suspended
/// again. A VM with checkpoints, or with disks that keep their writes, is not moved. Where the move
/// fails, the VM goes on where it was.
#[utoipa::path(post, path = "/v1/vms/{vm}/migrate", params(("vm" = String, Path), Wait,
    ("Idempotency-Key" = Option<String>, Header)), request_body = MigrateVm,
    responses((status = 200, body = MovedVm), (status = 202, body = Operation)))]
pub(super) async fn migrate(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    IdempotencyKey(key): IdempotencyKey,
    waiting: Waiting,
    Body(request): Body<MigrateVm>,
) -> Answer<Response> {
    caller.may(Role::Admin)?;
    let vm = caller.vm(&app, &vm).await?;
    let requester = caller.requester(key);
    let started = app.controller.migrate_vm(&requester, &vm, &request);
    operations::answer(&app, started.await?, waiting, StatusCode::OK).await
}
