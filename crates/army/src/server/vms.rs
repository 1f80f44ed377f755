//! VMs. In paths, a VM is named by its id, by the name of a VM of the caller's own tenant that has
//! not ended, or as `TENANT/NAME`, whose `/` is percent-encoded.

use army_api::keys::Role;
use army_api::operations::{Operation, Wait};
use army_api::templates::Template;
use army_api::vms::{
    Balloon, CreateVms, CreatedVms, ForkVm, SetBalloon, SnapshotVm, Vm, VmFilter, VmPage,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;

use super::auth::Caller;
use super::extract::{Body, IdempotencyKey, Params, Path};
use super::operations::Waiting;
use super::{Answer, App, egress, operations};

/// Lists VMs, one page at a time.
#[utoipa::path(get, path = "/v1/vms", params(VmFilter),
    responses((status = 200, body = VmPage)))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Params(filter): Params<VmFilter>,
) -> Answer<Json<VmPage>> {
    let requester = caller.requester(None);
    Ok(Json(app.controller.vms(&filter, &requester).await?))
}

/// Creates VMs from a template.
///
/// The response is sent when the VMs are running. If none of them can be created, it is an error.
#[utoipa::path(post, path = "/v1/vms", request_body = CreateVms,
    params(Wait, ("Idempotency-Key" = Option<String>, Header,
        description = "A key chosen by the client, 1 to 200 visible ASCII characters. \
            Repeating a request with the same key does not create the VMs twice")),
    responses((status = 201, body = CreatedVms), (status = 202, body = Operation)))]
pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    IdempotencyKey(key): IdempotencyKey,
    waiting: Waiting,
    Body(request): Body<CreateVms>,
) -> Answer<Response> {
    caller.may(Role::User)?;
    egress::check(&caller, request.network.as_ref())?;
    let requester = caller.requester(key);
    let started = app.controller.create(&requester, request).await?;
    operations::answer(&app, started, waiting, StatusCode::CREATED).await
}

/// Returns one VM.
#[utoipa::path(get, path = "/v1/vms/{vm}", params(("vm" = String, Path)),
    responses((status = 200, body = Vm)))]
pub(super) async fn inspect(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Vm>> {
    Ok(Json(caller.vm(&app, &vm).await?))
}

/// Destroys a VM.
///
/// A VM that has already ended is returned unchanged.
#[utoipa::path(delete, path = "/v1/vms/{vm}", params(("vm" = String, Path)),
    responses((status = 200, body = Vm)))]
pub(super) async fn destroy(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Vm>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.destroy(&vm).await?))
}

/// Pauses a running VM.
#[utoipa::path(post, path = "/v1/vms/{vm}/pause", params(("vm" = String, Path)),
    responses((status = 200, body = Vm)))]
pub(super) async fn pause(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Vm>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.pause(&vm).await?))
}

/// Suspends a VM: its state is kept on its host's disk, and it uses no memory. It goes on as the same
/// VM when it is resumed, or when a command, terminal, file or forwarded port is requested of it.
#[utoipa::path(post, path = "/v1/vms/{vm}/suspend", params(("vm" = String, Path)),
    responses((status = 200, body = Vm)))]
pub(super) async fn suspend(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Vm>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.suspend(&vm).await?))
}

/// Resumes a paused or suspended VM.
#[utoipa::path(post, path = "/v1/vms/{vm}/resume", params(("vm" = String, Path)),
    responses((status = 200, body = Vm)))]
pub(super) async fn resume(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Vm>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.resume(&vm).await?))
}

/// Creates live forks of a running VM. The VM itself continues to run.
#[utoipa::path(post, path = "/v1/vms/{vm}/fork", params(("vm" = String, Path), Wait,
    ("Idempotency-Key" = Option<String>, Header)), request_body = ForkVm,
    responses((status = 201, body = CreatedVms), (status = 202, body = Operation)))]
pub(super) async fn fork(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    IdempotencyKey(key): IdempotencyKey,
    waiting: Waiting,
    Body(request): Body<ForkVm>,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let parent = caller.vm(&app, &vm).await?;
    let requester = caller.requester(key);
    let started = app.controller.fork_vm(&requester, &parent, request).await?;
    operations::answer(&app, started, waiting, StatusCode::CREATED).await
}

/// Creates a template from a VM. The VM itself continues to run.
///
/// Everything in the guest's memory is in the template. It is private, but for one that an
/// administrator makes of a VM of their own tenant.
#[utoipa::path(post, path = "/v1/vms/{vm}/snapshot", params(("vm" = String, Path), Wait,
    ("Idempotency-Key" = Option<String>, Header)), request_body = SnapshotVm,
    responses((status = 201, body = Template), (status = 202, body = Operation)))]
pub(super) async fn snapshot(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    IdempotencyKey(key): IdempotencyKey,
    waiting: Waiting,
    Body(request): Body<SnapshotVm>,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    let requester = caller.requester(key);
    let started = app.controller.snapshot(&requester, &vm, request).await?;
    operations::answer(&app, started, waiting, StatusCode::CREATED).await
}

/// Returns the memory balloon of a VM.
#[utoipa::path(get, path = "/v1/vms/{vm}/balloon", params(("vm" = String, Path)),
    responses((status = 200, body = Balloon)))]
pub(super) async fn balloon(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Balloon>> {
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.balloon(&vm, None).await?))
}

/// Requests a new size of a VM's memory balloon.
///
/// The guest hands over or takes back the memory gradually.
#[utoipa::path(put, path = "/v1/vms/{vm}/balloon", params(("vm" = String, Path)), request_body = SetBalloon,
    responses((status = 200, body = Balloon)))]
pub(super) async fn set_balloon(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(request): Body<SetBalloon>,
) -> Answer<Json<Balloon>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(
        app.controller.balloon(&vm, Some(request.bytes)).await?,
    ))
}
