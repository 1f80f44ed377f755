//! Directories in guests: what they hold, new names, archives, and what happens to them.

use std::convert::Infallible;
use std::time::Duration;

use agent_client::ByteLimit;
use army_api::files::{
    ArchivePath, FileChange, FileChangeKind, FileEntry, FilePage, ListFiles, MakeDirectory,
    RemoveFile, RenameFile, StatFile, WatchFiles,
};
use army_api::keys::Role;
use axum::Json;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use tokio::sync::mpsc;

use super::auth::Caller;
use super::downloads::body;
use super::events::sent_events;
use super::extract::{Body, Params, Path};
use super::files::fill;
use super::sessions::Guest;
use super::{AGENT_LIMIT, Answer, App};
use army_controller::{Error, guest_files};

/// How long a guest may take to begin with an archive, and to end it. Its bytes add to that.
const ARCHIVE_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest may take to remove a directory.
const REMOVAL_LIMIT: Duration = Duration::from_secs(120);
/// The largest archive that is read. It is never held in memory.
const MAX_ARCHIVE: ByteLimit = ByteLimit::new(1 << 40);
/// The number of changes that may wait for a slow reader, before the guest has to wait.
const AHEAD: usize = 16;

/// Connects to the agent in a VM that the caller may use.
async fn connect(app: &App, caller: &Caller, vm: &str, limit: Duration) -> Answer<Guest> {
    caller.may(Role::User)?;
    let vm = caller.vm(app, vm).await?;
    app.guest(caller, &vm, limit).await
}

/// Lists a directory in a guest, one page at a time.
///
/// The entries are in the order of their names' bytes. A directory that changes between two pages
/// neither repeats nor skips an entry that was there all the time.
#[utoipa::path(get, path = "/v1/vms/{vm}/files/list", params(("vm" = String, Path), ListFiles),
    responses((status = 200, body = FilePage)))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(request): Params<ListFiles>,
) -> Answer<Json<FilePage>> {
    let request = guest_files::list(request)?;
    let connection = connect(&app, &caller, &vm, AGENT_LIMIT).await?.connection;
    let page = connection.list_directory(request).await;
    Ok(Json(guest_files::page(page.map_err(Error::from)?)))
}

/// Describes a file, a directory or a link in a guest.
#[utoipa::path(get, path = "/v1/vms/{vm}/files/stat", params(("vm" = String, Path), StatFile),
    responses((status = 200, body = FileEntry)))]
pub(super) async fn stat(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(request): Params<StatFile>,
) -> Answer<Json<FileEntry>> {
    let request = guest_files::stat(request)?;
    let connection = connect(&app, &caller, &vm, AGENT_LIMIT).await?.connection;
    let entry = connection.stat(request).await.map_err(Error::from)?;
    Ok(Json(guest_files::entry(entry)))
}

/// Makes a directory in a guest.
#[utoipa::path(post, path = "/v1/vms/{vm}/files/mkdir", params(("vm" = String, Path)),
    request_body = MakeDirectory, responses((status = 204)))]
pub(super) async fn make(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(request): Body<MakeDirectory>,
) -> Answer<StatusCode> {
    let request = guest_files::make(request)?;
    let connection = connect(&app, &caller, &vm, AGENT_LIMIT).await?.connection;
    let made = connection.make_directory(request).await;
    made.map_err(Error::from)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Renames a file or a directory in a guest, within its file system.
#[utoipa::path(post, path = "/v1/vms/{vm}/files/rename", params(("vm" = String, Path)),
    request_body = RenameFile, responses((status = 204)))]
pub(super) async fn rename(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(request): Body<RenameFile>,
) -> Answer<StatusCode> {
    let request = guest_files::rename(request)?;
    let connection = connect(&app, &caller, &vm, AGENT_LIMIT).await?.connection;
    connection.rename(request).await.map_err(Error::from)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a file or a directory in a guest.
///
/// A directory with more than 100,000 files is removed in part, and the failure says so. Other file
/// systems that are mounted in a directory are not removed.
#[utoipa::path(delete, path = "/v1/vms/{vm}/files", params(("vm" = String, Path), RemoveFile),
    responses((status = 204)))]
pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(request): Params<RemoveFile>,
) -> Answer<StatusCode> {
    let request = guest_files::remove(request)?;
    let Guest {
        connection,
        mut ending,
    } = connect(&app, &caller, &vm, REMOVAL_LIMIT).await?;
    let removal = async { Ok(connection.remove(request).await.map_err(Error::from)?) };
    ending.unless_removed(removal).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads a directory in a guest as a tar archive.
///
/// Links are stored and not followed. Devices, pipes and sockets are left out.
#[utoipa::path(get, path = "/v1/vms/{vm}/files/archive", params(("vm" = String, Path), ArchivePath),
    responses((status = 200, content_type = "application/x-tar")))]
pub(super) async fn pack(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(request): Params<ArchivePath>,
) -> Answer<Response> {
    let request = guest_files::pack(request)?;
    let Guest { connection, ending } = connect(&app, &caller, &vm, ARCHIVE_LIMIT).await?;
    let download = connection.pack(request, MAX_ARCHIVE).await;
    let body = body(&app, &caller, download.map_err(Error::from)?, ending).await?;
    let media = [(header::CONTENT_TYPE, "application/x-tar")];
    Ok((media, body).into_response())
}

/// Unpacks a tar archive, of any size, into a directory in a guest.
///
/// Each file appears as a whole. Nothing outside of the directory is written, whatever the paths and
/// links in the archive are. An archive that is refused or cut short is unpacked in part.
#[utoipa::path(put, path = "/v1/vms/{vm}/files/archive", params(("vm" = String, Path), ArchivePath),
    request_body(content_type = "application/x-tar"), responses((status = 204)))]
pub(super) async fn unpack(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(request): Params<ArchivePath>,
    content: Request,
) -> Answer<StatusCode> {
    let request = guest_files::unpack(request)?;
    let Guest {
        connection,
        mut ending,
    } = connect(&app, &caller, &vm, ARCHIVE_LIMIT).await?;
    let content = content.into_body().into_data_stream();
    let upload = connection.unpack(request).map_err(Error::from)?;
    ending.unless_removed(fill(upload, content)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Streams changes of files in a guest as server-sent events.
///
/// The first event is `watching`: every later change is sent, or an event `lost` in its place. The
/// stream ends when what is watched is gone, when the caller's key is removed, or when the server
/// stops.
#[utoipa::path(get, path = "/v1/vms/{vm}/files/watch", params(("vm" = String, Path), WatchFiles),
    responses((status = 200, body = FileChange, content_type = "text/event-stream")))]
pub(super) async fn watch(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(request): Params<WatchFiles>,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>>>> {
    let request = guest_files::watch(request)?;
    let Guest {
        connection,
        mut ending,
    } = connect(&app, &caller, &vm, AGENT_LIMIT).await?;
    let mut watch = connection.watch(request).await.map_err(Error::from)?;
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let follow = async {
            // The response ends where the connection is lost, too: the client watches again.
            while let Ok(Some(change)) = watch.next().await {
                if sender.send(guest_files::change(&change)).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            () = follow => {}
            () = sender.closed() => {}
            _ = ending.reason() => {}
        }
    });
    let first = FileChange {
        kind: FileChangeKind::Watching,
        path: String::new(),
        directory: false,
    };
    Ok(sent_events(Some(first), receiver))
}
