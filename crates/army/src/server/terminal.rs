//! Terminals: a program in a guest, interactive, over a WebSocket.
//!
//! Binary messages are the bytes of the terminal, and text messages are [`TerminalMessage`]s.

use std::time::{Duration, Instant};

use agent_client::{Connection, Event, Running};
use agent_proto::messages::{Exec, TerminalSize};
use army_api::exec::{Terminal, TerminalMessage};
use army_api::keys::Role;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use axum::response::Response;
use tokio::time::timeout;

use super::auth::Caller;
use super::extract::{Params, Path, Upgrade};
use super::sessions::{Ending, Guest};
use super::{AGENT_LIMIT, Answer, App, PING_EVERY, SILENCE};
use army_controller::Error;

/// The subprotocol that a browser offers beside its key. The response has to select one of those
/// that were offered.
const SUBPROTOCOL: &str = "army.terminal";
/// How long a guest may take to accept input.
pub(super) const INPUT_LIMIT: Duration = Duration::from_secs(120);
/// The largest message of a client, in bytes.
pub(super) const MAX_MESSAGE: usize = 256 * 1024;

/// Opens a terminal in a VM.
///
/// The response is a WebSocket. A browser offers two subprotocols: `army.terminal`, and `army.key.`
/// followed by its key.
#[utoipa::path(get, path = "/v1/vms/{vm}/terminal", params(("vm" = String, Path), Terminal),
    responses((status = 101)))]
pub(super) async fn terminal(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Params(request): Params<Terminal>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    let environment = app.controller.environment(&vm).await?;
    let Guest { connection, ending } = app.guest(&caller, &vm, AGENT_LIMIT).await?;
    let running = start(connection, request, &environment).await?;
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| serve(socket, running, ending)))
}

async fn start(
    connection: Connection,
    request: Terminal,
    environment: &std::collections::BTreeMap<String, String>,
) -> army_controller::Result<Running> {
    let mut variables: Vec<String> = environment
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    variables.push("TERM=xterm-256color".into());
    // Older agents do not know login shells.
    let shell = || {
        vec![
            "/bin/sh".into(),
            "-c".into(),
            "exec ${SHELL:-/bin/sh} -l".into(),
        ]
    };
    let exec = Exec {
        login_shell: request.command.is_none(),
        command: match request.command {
            Some(command) => vec!["/bin/sh".into(), "-c".into(), command],
            None => shell(),
        },
        environment: variables,
        terminal: Some(TerminalSize {
            rows: request.rows.into(),
            columns: request.columns.into(),
        }),
        input: true,
        ..Exec::default()
    };
    let running = connection.exec(exec).await.map_err(Error::from)?;
    Ok(running.streaming())
}

/// Serves a terminal until its program ends or its client disconnects. The agent in the guest then
/// hangs up the terminal. It also does when the caller's key is removed, or the server stops.
async fn serve(mut socket: WebSocket, mut running: Running, mut ending: Ending) {
    let mut ping = tokio::time::interval(PING_EVERY);
    let mut last_message = Instant::now();
    // When the guest began to accept no input.
    let mut full_since = None;
    loop {
        // While a guest accepts no input, it is not noticed that its client has closed the
        // connection in order: that message is behind the input.
        let accepts_input = running.accepts_input();
        match accepts_input {
            true => full_since = None,
            false => {
                full_since.get_or_insert_with(Instant::now);
                last_message = Instant::now();
            }
        }
        tokio::select! {
            reason = ending.reason() => {
                drop(running);
                send(&mut socket, Message::Close(Some(reason.close_frame()))).await;
                return;
            }
            _ = ping.tick() => {
                let is_full = full_since.is_some_and(|since| since.elapsed() > INPUT_LIMIT);
                let is_silent = last_message.elapsed() > SILENCE;
                if is_full || is_silent || !send(&mut socket, Message::Ping(Bytes::new())).await {
                    return;
                }
            }
            event = running.next_event() => match event {
                Ok(Event::Output(_, data)) => {
                    if !send(&mut socket, Message::Binary(data.into())).await {
                        return;
                    }
                }
                Ok(Event::Lost(..)) => {}
                Ok(Event::Exited(exited)) => return close(socket, exited.code).await,
                Err(_) => return,
            },
            message = socket.recv(), if accepts_input => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(message)) => {
                    last_message = Instant::now();
                    type_in(&mut running, message);
                }
            },
        }
    }
}

/// Tells the client that the program has ended.
async fn close(mut socket: WebSocket, exit_code: Option<i32>) {
    let text = serde_json::to_string(&TerminalMessage::Exited { exit_code });
    send(&mut socket, Message::Text(text.unwrap_or_default().into())).await;
    let frame = CloseFrame {
        code: close_code::NORMAL,
        reason: "exited".into(),
    };
    send(&mut socket, Message::Close(Some(frame))).await;
}

/// Returns false where the client has disconnected.
pub(super) async fn send(socket: &mut WebSocket, message: Message) -> bool {
    let sent = timeout(SILENCE, socket.send(message)).await;
    matches!(sent, Ok(Ok(())))
}

fn type_in(running: &mut Running, message: Message) {
    match message {
        Message::Binary(bytes) => running.write(&bytes),
        Message::Text(text) => match serde_json::from_str(&text) {
            Ok(TerminalMessage::Resize { rows, columns }) => running.resize(TerminalSize {
                rows: rows.into(),
                columns: columns.into(),
            }),
            // Other messages are ignored.
            Ok(TerminalMessage::Exited { .. }) | Err(_) => {}
        },
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => {}
    }
}
