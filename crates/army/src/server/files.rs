//! Files in guests, as streams in both directions.

use std::io;
use std::time::Duration;

use agent_proto::client::ByteLimit;
use army_api::exec::FilePath;
use army_api::keys::Role;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::auth::Caller;
use super::extract::{Params, Path};
use super::{Answer, App, blocking, failure};
use army_controller::{Error, ErrorKind, guest};
use army_node_api::chunks::{self, ChunkReader, ChunkWriter};

/// How long a guest may take to begin with a file, and to end it. The bytes of the file add to that.
const LIMIT: Duration = Duration::from_secs(60);
/// The largest file that is read. It is never held in memory.
const MAX_FILE: ByteLimit = ByteLimit::new(1 << 40);

/// Reads a file from a guest.
#[utoipa::path(get, path = "/v1/vms/{vm}/files", params(("vm" = String, Path), FilePath),
    responses((status = 200, content_type = "application/octet-stream")))]
pub(super) async fn read(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(file): Params<FilePath>,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let file = guest::put(file)?;
    let vm = caller.vm(&app, &vm).await?;
    let (connection, in_use) = app.controller.agent(&vm, LIMIT).await?;
    let (sender, content) = chunks::channel();
    tokio::task::spawn_blocking(move || {
        let mut sink = ChunkWriter(sender.clone());
        if let Err(error) = connection.get(&file.path, &mut sink, MAX_FILE) {
            let _ = sender.blocking_send(Err(io::Error::other(Error::from(error))));
        }
        drop(in_use);
    });
    failure::bytes(content, ErrorKind::GuestUnavailable).await
}

/// Writes the body of the request, of any size, to a file in a guest.
///
/// The file appears only when it is complete.
#[utoipa::path(put, path = "/v1/vms/{vm}/files", params(("vm" = String, Path), FilePath),
    request_body(content_type = "application/octet-stream"),
    responses((status = 204)))]
pub(super) async fn write(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(file): Params<FilePath>,
    request: Request,
) -> Answer<StatusCode> {
    caller.may(Role::User)?;
    let file = guest::put(file)?;
    let vm = caller.vm(&app, &vm).await?;
    let content = chunks::receive(request.into_body().into_data_stream());
    let (connection, in_use) = app.controller.agent(&vm, LIMIT).await?;
    blocking(move || {
        let _in_use = in_use;
        Ok(connection.put(file, &mut ChunkReader::new(content))?)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
