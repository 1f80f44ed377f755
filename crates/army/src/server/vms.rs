//! VMs. In paths they are called by their id, or by the name of one that is not over.

use army_api::Problem;
use army_api::keys::Role;
use army_api::templates::Template;
use army_api::vms::{
    Balloon, CreateVms, CreatedVms, ForkVm, SetBalloon, SnapshotVm, Vm, VmFilter, VmPage,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use super::auth::Caller;
use super::extract::{Body, IdempotencyKey, Params, Path};
use super::{Answer, App};
use army_controller::store::requests::Known;

/// Lists VMs, one page at a time.
#[utoipa::path(get, path = "/v1/vms", params(VmFilter),
    responses((status = 200, body = VmPage)))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Params(filter): Params<VmFilter>,
) -> Answer<Json<VmPage>> {
    Ok(Json(
        app.controller.store.vms(&filter, caller.scope()).await?,
    ))
}

/// Creates VMs from a template.
///
/// The response is sent when the VMs are running.
#[utoipa::path(post, path = "/v1/vms", request_body = CreateVms,
    params(("Idempotency-Key" = Option<String>, Header,
        description = "A key chosen by the client, 1 to 200 visible ASCII characters. \
            Repeating a request with the same key does not create the VMs twice")),
    responses((status = 201, body = CreatedVms)))]
pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    IdempotencyKey(key): IdempotencyKey,
    Body(asked): Body<CreateVms>,
) -> Answer<(StatusCode, Json<CreatedVms>)> {
    caller.may(Role::User)?;
    to_its_end(async move {
        let tenant = caller.key.tenant.clone();
        let request = key.clone();
        once(&app, &caller, "create", key, &asked.clone(), async {
            app.controller
                .create(&tenant, asked, request.as_deref())
                .await
        })
        .await
    })
    .await
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
    Ok(Json(app.controller.set_paused(&vm, true).await?))
}

/// Resumes a paused VM.
#[utoipa::path(post, path = "/v1/vms/{vm}/resume", params(("vm" = String, Path)),
    responses((status = 200, body = Vm)))]
pub(super) async fn resume(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Vm>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.set_paused(&vm, false).await?))
}

/// Creates live forks of a running VM. The VM itself continues to run.
#[utoipa::path(post, path = "/v1/vms/{vm}/fork", params(("vm" = String, Path),
    ("Idempotency-Key" = Option<String>, Header)), request_body = ForkVm,
    responses((status = 201, body = CreatedVms)))]
pub(super) async fn fork(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    IdempotencyKey(key): IdempotencyKey,
    Body(asked): Body<ForkVm>,
) -> Answer<(StatusCode, Json<CreatedVms>)> {
    caller.may(Role::User)?;
    let parent = caller.vm(&app, &vm).await?;
    to_its_end(async move {
        let request = key.clone();
        let hashed = (parent.id.clone(), asked.clone());
        once(&app, &caller, "fork", key, &hashed, async {
            let controller = &app.controller;
            controller
                .fork_live(&parent.tenant, &parent, asked, request.as_deref())
                .await
        })
        .await
    })
    .await
}

/// Creates a template from a VM. The VM itself continues to run.
#[utoipa::path(post, path = "/v1/vms/{vm}/snapshot", params(("vm" = String, Path)), request_body = SnapshotVm,
    responses((status = 201, body = Template)))]
pub(super) async fn snapshot(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(asked): Body<SnapshotVm>,
) -> Answer<(StatusCode, Json<Template>)> {
    // Templates are everybody's: what a guest holds would be told to all tenants.
    caller.may(Role::Admin)?;
    let vm = caller.vm(&app, &vm).await?;
    let template = app.controller.snapshot(&vm, asked).await?;
    Ok((StatusCode::CREATED, Json(template)))
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
    Body(asked): Body<SetBalloon>,
) -> Answer<Json<Balloon>> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.balloon(&vm, Some(asked.bytes)).await?))
}

/// Does work that is not dropped half done when its client goes away: who asks again with the same
/// key is to find how it ended.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Answer<T>> + Send + 'static,
) -> Answer<T> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        let detail = format!("a task failed: {error}");
        Err(Problem::new(army_api::ProblemKind::Internal, detail).into())
    })
}

/// Does what is asked for, or answers again what was answered to the same request before.
async fn once(
    app: &App,
    caller: &Caller,
    what: &str,
    key: Option<String>,
    asked: &impl Serialize,
    work: impl Future<Output = Result<CreatedVms, Problem>>,
) -> Answer<(StatusCode, Json<CreatedVms>)> {
    let store = &app.controller.store;
    let tenant = &caller.key.tenant;
    let internal =
        |error: serde_json::Error| Problem::new(army_api::ProblemKind::Internal, error.to_string());
    let Some(key) = key else {
        return Ok((StatusCode::CREATED, Json(work.await?)));
    };
    let asked = serde_json::to_string(&(what, asked)).map_err(internal)?;
    if let Known::Answered(answer) = store.begin_request(tenant, &key, &asked).await? {
        let created: CreatedVms = serde_json::from_str(&answer).map_err(internal)?;
        return Ok((StatusCode::CREATED, Json(created)));
    }
    match work.await {
        Ok(created) => {
            let answer = serde_json::to_string(&created).map_err(internal)?;
            store.answer_request(tenant, &key, &answer).await?;
            Ok((StatusCode::CREATED, Json(created)))
        }
        Err(problem) => {
            // It can be tried again with the same key.
            store.drop_request(tenant, &key).await?;
            Err(problem.into())
        }
    }
}
