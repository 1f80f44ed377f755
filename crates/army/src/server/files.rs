//! Files in guests, as streams in both directions.

use std::time::Duration;

use agent_client::{ByteLimit, Upload};
use army_api::exec::FilePath;
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::body::BodyDataStream;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use tokio::time::timeout;

use super::auth::Caller;
use super::downloads::body;
use super::extract::{Params, Path};
use super::ranges::{self, Range};
use super::sessions::Guest;
use super::{Answer, App};
use army_controller::{Error, guest};

/// How long a guest may take to begin with a file, and to end it. The bytes of the file add to that.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a client may send nothing of a file.
const SILENCE: Duration = Duration::from_secs(30);
/// The largest file that is read. It is never held in memory.
const MAX_FILE: ByteLimit = ByteLimit::new(1 << 40);

/// Reads a file from a guest, or one range of its bytes.
///
/// A `Range` header is ignored where the guest's agent is of a release that cannot read ranges; the
/// answer is the whole file then.
#[utoipa::path(get, path = "/v1/vms/{vm}/files", params(("vm" = String, Path), FilePath,
    ("Range" = Option<String>, Header, description = "The bytes to read, as in `bytes=0-99`")),
    responses((status = 200, content_type = "application/octet-stream"),
        (status = 206, content_type = "application/octet-stream")))]
pub(super) async fn read(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(file): Params<FilePath>,
    headers: HeaderMap,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let file = guest::put(file)?;
    let vm = caller.vm(&app, &vm).await?;
    let mut guest = app.guest(&caller, &vm, LIMIT).await?;
    if let Some(range) = ranges::requested(&headers)
        && ranges::is_supported(&guest.connection)
    {
        let size = match range {
            Range::From(..) => 0,
            Range::Last(_) => {
                let size = ranges::size(guest.connection, &file.path).await?;
                guest = app.guest(&caller, &vm, LIMIT).await?;
                size
            }
        };
        let place = range.place(size);
        return ranges::read(&app, &caller, guest, &file.path, place, MAX_FILE).await;
    }
    let Guest { connection, ending } = guest;
    let download = connection.get(&file.path, MAX_FILE).await;
    let body = body(&app, &caller, download.map_err(Error::from)?, ending).await?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream"),
        (header::ACCEPT_RANGES, "bytes"),
    ];
    Ok((headers, body).into_response())
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
    let Guest {
        connection,
        mut ending,
    } = app.guest(&caller, &vm, LIMIT).await?;
    let content = request.into_body().into_data_stream();
    let upload = connection.put(file).map_err(Error::from)?;
    ending.unless_removed(fill(upload, content)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sends a body to a guest, for what counts only where the body has come to its end.
pub(super) async fn fill(mut upload: Upload, mut content: BodyDataStream) -> Answer<()> {
    loop {
        let Ok(chunk) = timeout(SILENCE, content.next()).await else {
            let detail = format!("no data arrived for {} seconds", SILENCE.as_secs());
            return Err(Problem::new(ProblemKind::Timeout, detail).into());
        };
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(|error| {
            let detail = format!("the request body was cut off: {error}");
            Problem::new(ProblemKind::InvalidRequest, detail)
        })?;
        if !upload.write(&chunk).await.map_err(Error::from)? {
            break;
        }
    }
    Ok(upload.finish().await.map_err(Error::from)?)
}
