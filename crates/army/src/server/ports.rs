//! Ports of guests: a TCP connection in a guest, over a WebSocket.
//!
//! Binary messages are the bytes of the connection, and text messages are [`PortMessage`]s. The two
//! directions are independent, because a server that waits for its client to read must continue to
//! read from the client. The agent's connection blocks, so each direction also has a thread.

use agent_proto::client::{ClientError, TunnelIn, TunnelOut};
use army_api::exec::PortMessage;
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use axum::response::Response;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::{mpsc, oneshot};

use super::auth::Caller;
use super::extract::{Path, Upgrade};
use super::{AGENT_LIMIT, Answer, App, blocking};
use army_node_api::InUse;

/// The subprotocol that a browser offers beside its key. The response has to select one of those
/// that were offered.
const SUBPROTOCOL: &str = "army.port";
/// The number of messages that may wait for a slow side, before the other side has to wait.
const AHEAD: usize = 16;
/// The largest message of a client, in bytes.
const MAX_MESSAGE: usize = 256 * 1024;

/// Connects to a TCP port on a VM's loopback interface.
///
/// The response is a WebSocket whose binary messages are the bytes of the connection. A browser
/// offers two subprotocols: `army.port`, and `army.key.` followed by its key.
#[utoipa::path(get, path = "/v1/vms/{vm}/ports/{port}",
    params(("vm" = String, Path), ("port" = u16, Path, minimum = 1)),
    responses((status = 101)))]
pub(super) async fn connect(
    State(app): State<App>,
    caller: Caller,
    Path((vm, port)): Path<(String, u16)>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    caller.may(Role::User)?;
    if port == 0 {
        let detail = "0 is not a valid TCP port";
        return Err(Problem::new(ProblemKind::InvalidRequest, detail).into());
    }
    let vm = caller.vm(&app, &vm).await?;
    let (connection, in_use) = app.controller.agent(&vm, AGENT_LIMIT).await?;
    let (out, into) = blocking(move || Ok(connection.connect(port)?)).await?;
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| serve(socket, out, into, in_use)))
}

/// Bytes from the guest; `None` at their end.
type Output = Result<Option<Vec<u8>>, ClientError>;

async fn serve(socket: WebSocket, mut out: TunnelOut, into: TunnelIn, in_use: InUse) {
    let (sender, receiver) = socket.split();
    let (outgoing, output) = mpsc::channel::<Output>(AHEAD);
    let (incoming, mut input) = mpsc::channel::<Option<Vec<u8>>>(AHEAD);
    tokio::task::spawn_blocking(move || {
        loop {
            let read = out.read();
            let more = matches!(read, Ok(Some(_)));
            if outgoing.blocking_send(read).is_err() || !more {
                return;
            }
        }
    });
    let writer = into.clone();
    tokio::task::spawn_blocking(move || {
        while let Some(piece) = input.blocking_recv() {
            let written = match piece {
                Some(bytes) => writer.write(&bytes),
                None => writer.end(),
            };
            // The reading direction reports the reason.
            if written.is_err() {
                return;
            }
        }
    });
    let (client_end, ended) = oneshot::channel();
    tokio::select! {
        () = to_client(sender, output, ended) => {}
        () = to_guest(receiver, incoming, client_end) => {}
    }
    into.disconnect();
    drop(in_use);
}

/// Sends to the client until both sides have ended, or the guest's side is lost.
async fn to_client(
    mut sender: SplitSink<WebSocket, Message>,
    mut output: mpsc::Receiver<Output>,
    client_ended: oneshot::Receiver<()>,
) {
    let code = loop {
        match output.recv().await {
            Some(Ok(Some(bytes))) => {
                if sender.send(Message::Binary(bytes.into())).await.is_err() {
                    return;
                }
            }
            Some(Ok(None)) => {
                let text = serde_json::to_string(&PortMessage::End).unwrap_or_default();
                if sender.send(Message::Text(text.into())).await.is_err() {
                    return;
                }
                // A client that disconnects without an end message is noticed by the other direction.
                let _ = client_ended.await;
                break close_code::NORMAL;
            }
            Some(Err(_)) | None => break close_code::ERROR,
        }
    };
    let frame = CloseFrame {
        code,
        reason: "".into(),
    };
    let _ = sender.send(Message::Close(Some(frame))).await;
}

/// Receives from the client until it disconnects.
async fn to_guest(
    mut receiver: SplitStream<WebSocket>,
    incoming: mpsc::Sender<Option<Vec<u8>>>,
    client_end: oneshot::Sender<()>,
) {
    let mut client_end = Some(client_end);
    while let Some(Ok(message)) = receiver.next().await {
        let piece = match message {
            Message::Binary(bytes) => Some(bytes.to_vec()),
            Message::Text(text) => match serde_json::from_str(&text) {
                Ok(PortMessage::End) => None,
                // Other messages are ignored.
                Err(_) => continue,
            },
            Message::Close(_) => return,
            Message::Ping(_) | Message::Pong(_) => continue,
        };
        let is_end = piece.is_none();
        if client_end.is_none() {
            // The client has ended its side before.
            continue;
        }
        // Where the guest takes no more, the other direction tells the client why.
        let _ = incoming.send(piece).await;
        if is_end && let Some(client_end) = client_end.take() {
            let _ = client_end.send(());
        }
    }
}
