//! What VMs use, and what their guests have written to their consoles.

use army_api::figures::{ConsolePart, VmFigures};
use army_api::keys::Role;
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::auth::Caller;
use super::extract::{Params, Path};
use super::{Answer, App};

/// How much of a console's output is returned, where the client does not say, in bytes.
const DEFAULT_CONSOLE_BYTES: u32 = 64 << 10;

/// Returns the addresses of a VM, and its processor time, its disk and network traffic, and its
/// memory.
#[utoipa::path(get, path = "/v1/vms/{vm}/figures", params(("vm" = String, Path)),
    responses((status = 200, body = VmFigures)))]
pub(super) async fn figures(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<VmFigures>> {
    let vm = caller.vm(&app, &vm).await?;
    Ok(Json(app.controller.measure_vm(&vm).await?))
}

/// Returns the end of what the guest has written to its serial console, as text.
///
/// It is the guest's own, and may have control characters. What is not UTF-8 is replaced.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", params(("vm" = String, Path), ConsolePart),
    responses((status = 200, content_type = "text/plain")))]
pub(super) async fn console(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(part): Params<ConsolePart>,
) -> Answer<Response> {
    // It may have what the guest's programs print.
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    let bytes = part.bytes.unwrap_or(DEFAULT_CONSOLE_BYTES);
    let text = app.controller.console(&vm, bytes).await?;
    let media = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    Ok((media, text).into_response())
}
