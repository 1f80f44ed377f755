//! Background commands in guests: starting and listing them, reading their output, and signals.
//!
//! The agent in the guest keeps them. They outlive connections, and the processes of Army.

use std::convert::Infallible;

use agent_proto::messages::Acknowledge;
use army_api::exec::{Command, CommandEvent, Cursor, SendSignal, StartCommand};
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use futures_util::Stream;
use tokio::sync::mpsc;

use super::auth::Caller;
use super::events::sent_events;
use super::extract::{Body, IdempotencyKey, Params, Path};
use super::sessions::Guest;
use super::{AGENT_LIMIT, Answer, App};
use army_controller::{Error, guest};

/// The number of events that may wait for a slow reader, before the guest has to wait.
const AHEAD: usize = 1;

/// Connects to the agent in a VM that the caller may use.
async fn connect(app: &App, caller: &Caller, vm: &str) -> Answer<Guest> {
    caller.may(Role::User)?;
    let vm = caller.vm(app, vm).await?;
    app.guest(caller, &vm, AGENT_LIMIT).await
}

/// Starts a command without waiting for its end.
///
/// The command has no time limit unless one is given, and it gets no input. A repetition with the same
/// `Idempotency-Key` starts no other command.
#[utoipa::path(post, path = "/v1/vms/{vm}/commands", params(("vm" = String, Path),
    ("Idempotency-Key" = Option<String>, Header)), request_body = StartCommand,
    responses((status = 201, body = Command)))]
pub(super) async fn start(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    IdempotencyKey(key): IdempotencyKey,
    Body(request): Body<StartCommand>,
) -> Answer<(StatusCode, Json<Command>)> {
    caller.may(Role::User)?;
    let found = caller.vm(&app, &vm).await?;
    let requester = caller.requester(key);
    let started = app.controller.start_command(&requester, &found, request);
    Ok((StatusCode::CREATED, Json(started.await?)))
}

/// Lists the commands in a VM.
///
/// The list has the commands that the VM's agent keeps: those that are running, and those that have
/// ended but whose end has not been read, or not more than 10 minutes ago.
#[utoipa::path(get, path = "/v1/vms/{vm}/commands", params(("vm" = String, Path)),
    responses((status = 200, body = Vec<Command>)))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
) -> Answer<Json<Vec<Command>>> {
    let connection = connect(&app, &caller, &vm).await?.connection;
    let commands = connection.commands().await.map_err(Error::from)?;
    let commands = commands.into_iter().map(|it| Command {
        id: it.id,
        pid: it.pid,
        command: it.command,
        ended: it.exited.map(guest::exit_status),
    });
    Ok(Json(commands.collect()))
}

/// Streams the output of a command as server-sent events.
///
/// The stream begins at a cursor and ends when the command ends. A client that is disconnected
/// resumes with the last cursors that it received. It also ends when the caller's key is removed, or
/// the server stops.
#[utoipa::path(get, path = "/v1/vms/{vm}/commands/{id}/output",
    params(("vm" = String, Path), ("id" = u64, Path), Cursor),
    responses((status = 200, body = CommandEvent, content_type = "text/event-stream")))]
pub(super) async fn output(
    State(app): State<App>,
    caller: Caller,
    Path((vm, id)): Path<(String, u64)>,
    Params(cursor): Params<Cursor>,
) -> Answer<Sse<impl Stream<Item = std::result::Result<Event, Infallible>>>> {
    let Guest {
        connection,
        mut ending,
    } = connect(&app, &caller, &vm).await?;
    let running = connection.attach(id, of_cursor(cursor)).await;
    let running = running.map_err(Error::from)?.streaming();
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        // The response ends where the connection is lost. The client resumes with its last cursors.
        tokio::select! {
            _ = guest::follow(running, &sender, Some) => {}
            _ = ending.reason() => {}
        }
    });
    Ok(sent_events(None, receiver))
}

/// Sends a signal to a command.
#[utoipa::path(post, path = "/v1/vms/{vm}/commands/{id}/signal",
    params(("vm" = String, Path), ("id" = u64, Path)), request_body = SendSignal,
    responses((status = 204)))]
pub(super) async fn signal(
    State(app): State<App>,
    caller: Caller,
    Path((vm, id)): Path<(String, u64)>,
    Body(request): Body<SendSignal>,
) -> Answer<StatusCode> {
    if !(1..=64).contains(&request.signal) {
        let detail = format!("invalid signal {}: it must be 1 to 64", request.signal);
        return Err(Problem::new(ProblemKind::InvalidRequest, detail).into());
    }
    let connection = connect(&app, &caller, &vm).await?.connection;
    let sent = connection.signal_command(id, request.signal).await;
    sent.map_err(Error::from)?;
    Ok(StatusCode::NO_CONTENT)
}

fn of_cursor(cursor: Cursor) -> Acknowledge {
    Acknowledge {
        stdout_cursor: cursor.stdout,
        stderr_cursor: cursor.stderr,
    }
}
