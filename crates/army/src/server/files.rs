//! Files in guests, streamed both ways.

use std::io;

use agent_proto::messages::Put;
use army_api::exec::FilePath;
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::auth::Caller;
use super::extract::Params;
use super::{Answer, App};
use crate::blocking;
use crate::node::of_agent;
use crate::pipe::{AHEAD, Sink, Source};

/// Permissions of a new file, where the client does not say.
const DEFAULT_MODE: u32 = 0o644;

/// Reads a file of a guest.
#[utoipa::path(get, path = "/v1/vms/{vm}/files", params(("vm" = String, Path), FilePath),
    responses((status = 200, content_type = "application/octet-stream"), (status = "4XX", body = Problem)))]
pub(super) async fn read(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(file): Params<FilePath>,
) -> Answer<Response> {
    caller.may(Role::User)?;
    check(&file)?;
    let vm = caller.vm(&app, &vm).await?;
    let node = app.controller.node_of(&vm)?;
    let (connection, in_use) = blocking(move || node.agent(&vm.id)).await?;
    let (sender, mut receiver) = mpsc::channel::<io::Result<Bytes>>(AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut sink = Sink(sender.clone());
        if let Err(error) = connection.get(&file.path, &mut sink) {
            let _ = sender.blocking_send(Err(io::Error::other(of_agent(&error))));
        }
        drop(in_use);
    });
    // The first piece, or what is wrong, decides on the answer's status.
    let first = match receiver.recv().await {
        Some(Err(error)) => return Err(problem_of(error).into()),
        first => first,
    };
    let rest = futures_util::stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    });
    let body = Body::from_stream(futures_util::stream::iter(first).chain(rest));
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, body).into_response())
}

/// Writes a file into a guest: the request's body, of any size. It appears whole or not at all.
#[utoipa::path(put, path = "/v1/vms/{vm}/files", params(("vm" = String, Path), FilePath),
    request_body(content_type = "application/octet-stream"),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn write(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(file): Params<FilePath>,
    request: Request,
) -> Answer<StatusCode> {
    caller.may(Role::User)?;
    let mode = check(&file)?;
    let vm = caller.vm(&app, &vm).await?;
    let node = app.controller.node_of(&vm)?;
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(AHEAD);
    let mut body = request.into_body().into_data_stream();
    let feed = tokio::spawn(async move {
        while let Some(piece) = body.next().await {
            if sender.send(piece.map_err(io::Error::other)).await.is_err() {
                break;
            }
        }
    });
    let written = blocking(move || {
        let (connection, _in_use) = node.agent(&vm.id)?;
        let put = Put {
            path: file.path,
            mode,
            ..Put::default()
        };
        let mut source = Source::new(receiver);
        connection
            .put(put, &mut source)
            .map_err(|error| of_agent(&error))
    })
    .await;
    feed.abort();
    written?;
    Ok(StatusCode::NO_CONTENT)
}

/// The permissions that are asked for.
fn check(file: &FilePath) -> Result<u32, Problem> {
    let invalid = |detail: String| Problem::new(ProblemKind::InvalidRequest, detail);
    if !file.path.starts_with('/') || file.path.contains('\0') {
        let path = file.path.escape_debug();
        return Err(invalid(format!(
            "`{path}` is no absolute path in the guest"
        )));
    }
    let Some(mode) = &file.mode else {
        return Ok(DEFAULT_MODE);
    };
    let parsed = u32::from_str_radix(mode, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777);
    parsed.ok_or_else(|| invalid(format!("`{}` are no permissions", mode.escape_debug())))
}

fn problem_of(error: io::Error) -> Problem {
    let text = error.to_string();
    match error.into_inner().map(|inner| inner.downcast::<Problem>()) {
        Some(Ok(problem)) => *problem,
        _ => Problem::new(ProblemKind::GuestUnavailable, text),
    }
}
