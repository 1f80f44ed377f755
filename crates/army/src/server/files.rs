//! Files in guests, as streams in both directions.

use std::io;
use std::time::Duration;

use agent_client::{ByteLimit, ClientError, Download};
use army_api::exec::FilePath;
use army_api::keys::Role;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};

use super::auth::Caller;
use super::extract::{Params, Path};
use super::{Answer, App};
use army_controller::{Error, guest};
use army_node_api::chunks;

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
    let connection = app.controller.agent(&vm, LIMIT).await?;
    let mut download = connection
        .get(&file.path, MAX_FILE)
        .await
        .map_err(Error::from)?;
    // An error before the first bytes becomes the response.
    let first = download.next().await.map_err(Error::from)?;
    let body = match first {
        Some(first) => Body::from_stream(bytes(first, download)),
        None => Body::empty(),
    };
    let media = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((media, body).into_response())
}

/// The bytes of a file. They are read from the guest as the client takes them, and not any more
/// where the client disconnects.
fn bytes(first: Vec<u8>, download: Download) -> impl Stream<Item = io::Result<Bytes>> {
    let rest = stream::unfold(Some(download), |download| async {
        let mut download = download?;
        match download.next().await {
            Ok(Some(data)) => Some((Ok(data.into()), Some(download))),
            Ok(None) => None,
            Err(error) => Some((Err(io::Error::other(error)), None)),
        }
    });
    stream::iter([Ok(first.into())]).chain(rest)
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
    let mut content = chunks::receive(request.into_body().into_data_stream());
    let connection = app.controller.agent(&vm, LIMIT).await?;
    let mut upload = connection.put(file).map_err(Error::from)?;
    while let Some(chunk) = content.recv().await {
        let chunk = chunk.map_err(ClientError::Local).map_err(Error::from)?;
        if !upload.write(&chunk).await.map_err(Error::from)? {
            break;
        }
    }
    upload.finish().await.map_err(Error::from)?;
    Ok(StatusCode::NO_CONTENT)
}
