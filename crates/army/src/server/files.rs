//! Files in guests, as streams in both directions.

use std::io;
use std::time::Duration;

use agent_client::{ByteLimit, Download, Upload};
use army_api::exec::FilePath;
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use tokio::time::timeout;

use super::auth::Caller;
use super::budget::Budget;
use super::extract::{Params, Path};
use super::sessions::{Ending, Guest};
use super::{Answer, App};
use army_controller::{Error, guest};

/// How long a guest may take to begin with a file, and to end it. The bytes of the file add to that.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a client may send nothing of a file.
const SILENCE: Duration = Duration::from_secs(30);
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
    let Guest { connection, ending } = app.guest(&caller, &vm, LIMIT).await?;
    let mut download = connection
        .get(&file.path, MAX_FILE)
        .await
        .map_err(Error::from)?;
    // An error before the first bytes becomes the response.
    let first = download.next().await.map_err(Error::from)?;
    let body = match first {
        Some(first) => Reading {
            first: Some(first),
            download,
            ending,
            budget: app.budget,
            tenant: caller.key.tenant,
        }
        .into_body(),
        None => Body::empty(),
    };
    let media = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((media, body).into_response())
}

/// A file that is being read. It is read from the guest as the client takes it, and not any more
/// where the client disconnects.
struct Reading {
    first: Option<Vec<u8>>,
    download: Download,
    ending: Ending,
    budget: Budget,
    tenant: String,
}

impl Reading {
    fn into_body(self) -> Body {
        let bytes = stream::try_unfold(self, |mut reading| async move {
            let data = reading.next().await?;
            Ok::<_, io::Error>(data.map(|data| (data, reading)))
        });
        Body::from_stream(bytes)
    }

    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let data = match self.first.take() {
            Some(first) => Some(first),
            None => tokio::select! {
                data = self.download.next() => data.map_err(io::Error::other)?,
                // An error, because a part of a file must not look like all of it.
                () = self.ending.key_removed() => {
                    return Err(io::Error::other("the key was removed"));
                }
            },
        };
        Ok(match data {
            Some(data) => Some(self.budget.count(&self.tenant, data).await),
            None => None,
        })
    }
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

/// Writes a body to a file, which appears only where the body has come to its end.
async fn fill(mut upload: Upload, mut content: BodyDataStream) -> Answer<()> {
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
