//! Terminals: a program in a guest, interactive, over a WebSocket.
//!
//! Binary messages are the bytes of the terminal, and text messages are [`TerminalMessage`]s. The
//! agent's connection blocks, so each terminal has a thread that reads and a thread that writes.

use std::time::{Duration, Instant};

use agent_proto::client::{Connection, Event, Input, Running};
use agent_proto::messages::{Exec, TerminalSize};
use army_api::exec::{Terminal, TerminalMessage};
use army_api::keys::Role;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use axum::response::Response;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::auth::Caller;
use super::extract::{Params, Path, Upgrade};
use super::{AGENT_LIMIT, Answer, App, blocking};
use army_node_api::InUse;

/// The subprotocol that a browser offers beside its key. The response has to select one of those
/// that were offered.
const SUBPROTOCOL: &str = "army.terminal";
/// The number of messages that may wait for a slow client, before the guest has to wait.
const AHEAD: usize = 64;
/// How often a client is pinged. Browsers answer by themselves.
const PING_EVERY: Duration = Duration::from_secs(20);
/// A client that sends nothing for so long, or accepts nothing, has disconnected without notice.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a guest may take to accept input.
const INPUT_LIMIT: Duration = Duration::from_secs(120);
/// The largest message of a client, in bytes.
const MAX_MESSAGE: usize = 256 * 1024;

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
    let (connection, in_use) = app.controller.agent(&vm, AGENT_LIMIT).await?;
    let running = blocking(move || start(connection, request, &environment)).await?;
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| serve(socket, running, in_use)))
}

fn start(
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
    let running = connection.exec(exec)?;
    Ok(running.streaming())
}

/// A message from the guest to the client.
enum Outgoing {
    Bytes(Vec<u8>),
    Exited(Option<i32>),
}

async fn serve(mut socket: WebSocket, mut running: Running, in_use: InUse) {
    let input = running.input();
    let (outgoing, mut output) = mpsc::channel(AHEAD);
    let (typed, mut keys) = mpsc::channel::<Message>(AHEAD);
    tokio::task::spawn_blocking(move || {
        while let Ok(event) = running.next_event() {
            let message = match event {
                Event::Output(_, data) => Outgoing::Bytes(data),
                Event::Lost(..) => continue,
                Event::Exited(exited) => Outgoing::Exited(exited.code),
            };
            let ended = matches!(message, Outgoing::Exited(_));
            if outgoing.blocking_send(message).is_err() || ended {
                break;
            }
        }
    });
    let writer = input.clone();
    tokio::task::spawn_blocking(move || {
        while let Some(message) = keys.blocking_recv() {
            if type_in(&writer, message).is_err() {
                break;
            }
        }
    });
    let mut ping = tokio::time::interval(PING_EVERY);
    let mut last_message = Instant::now();
    loop {
        tokio::select! {
            _ = ping.tick() => {
                if last_message.elapsed() > SILENCE || !send(&mut socket, Message::Ping(Bytes::new())).await {
                    break;
                }
            }
            message = output.recv() => match message {
                Some(Outgoing::Bytes(bytes)) => {
                    if !send(&mut socket, Message::Binary(bytes.into())).await {
                        break;
                    }
                }
                Some(Outgoing::Exited(exit_code)) => {
                    let text = serde_json::to_string(&TerminalMessage::Exited { exit_code });
                    send(&mut socket, Message::Text(text.unwrap_or_default().into())).await;
                    let frame = CloseFrame { code: close_code::NORMAL, reason: "exited".into() };
                    send(&mut socket, Message::Close(Some(frame))).await;
                    break;
                }
                None => break,
            },
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                Some(Ok(message)) => {
                    last_message = Instant::now();
                    // While a guest accepts no input, it is not noticed that its client has
                    // disconnected.
                    let sent = timeout(INPUT_LIMIT, typed.send(message)).await;
                    if !matches!(sent, Ok(Ok(()))) {
                        break;
                    }
                }
            },
        }
    }
    // The agent in the guest hangs up the terminal.
    input.disconnect();
    drop(in_use);
}

/// Returns false where the client has disconnected.
async fn send(socket: &mut WebSocket, message: Message) -> bool {
    let sent = tokio::time::timeout(SILENCE, socket.send(message)).await;
    matches!(sent, Ok(Ok(())))
}

fn type_in(input: &Input, message: Message) -> Result<(), agent_proto::client::ClientError> {
    match message {
        Message::Binary(bytes) => input.write(&bytes),
        Message::Text(text) => match serde_json::from_str(&text) {
            Ok(TerminalMessage::Resize { rows, columns }) => input.resize(TerminalSize {
                rows: rows.into(),
                columns: columns.into(),
            }),
            // Other messages are ignored.
            Ok(TerminalMessage::Exited { .. }) | Err(_) => Ok(()),
        },
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => Ok(()),
    }
}
