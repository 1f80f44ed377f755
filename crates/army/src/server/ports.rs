//! Ports of guests: a TCP connection in a guest, over a WebSocket.
//!
//! Binary messages are the bytes of the connection, and text messages are [`PortMessage`]s. The two
//! directions are independent, because a server that waits for its client to read must continue to
//! read from the client.

use std::time::Instant;

use agent_client::Tunnel;
use army_api::exec::PortMessage;
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use axum::response::Response;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::time::timeout;

use super::auth::Caller;
use super::extract::{Path, Upgrade};
use super::sessions::{Ending, Guest, Reason};
use super::{AGENT_LIMIT, Answer, App, PING_EVERY, SILENCE};
use army_controller::Error;

/// The subprotocol that a browser offers beside its key. The response has to select one of those
/// that were offered.
const SUBPROTOCOL: &str = "army.port";
/// The largest message of a client, in bytes.
const MAX_MESSAGE: usize = 256 * 1024;

/// Connects to a TCP port on a VM's loopback interface.
///
/// The response is a WebSocket whose binary messages are the bytes of the connection. A browser
/// offers two subprotocols: `army.port`, and `army.key.` followed by its key. The connection ends
/// when the caller's key is removed, or when its client reads nothing for a minute.
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
    let Guest { connection, ending } = app.guest(&caller, &vm, AGENT_LIMIT).await?;
    let tunnel = connection.connect(port).await.map_err(Error::from)?;
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| serve(socket, tunnel, ending)))
}

/// A client, and the connection in the guest that it uses.
struct Session {
    receiver: SplitStream<WebSocket>,
    tunnel: Tunnel,
    /// The client has no more bytes to send.
    has_client_ended: bool,
    /// When the client last sent something, or could not because the guest takes no input.
    last_message: Instant,
}

/// Why a session is over before both sides have ended.
enum Over {
    /// The client has disconnected.
    Client,
    /// The connection in the guest is lost.
    Guest,
    /// The session has to end.
    Ended(Reason),
}

/// Serves a connection until both sides have ended, or either is lost. Dropping the tunnel then ends
/// the connection in the guest.
async fn serve(socket: WebSocket, tunnel: Tunnel, mut ending: Ending) {
    let (mut sender, receiver) = socket.split();
    let mut session = Session {
        receiver,
        tunnel,
        has_client_ended: false,
        last_message: Instant::now(),
    };
    let over = tokio::select! {
        over = session.run(&mut sender) => over,
        reason = ending.reason() => Err(Over::Ended(reason)),
    };
    drop(session);
    let frame = |code| CloseFrame {
        code,
        reason: "".into(),
    };
    let frame = match over {
        Ok(()) => frame(close_code::NORMAL),
        Err(Over::Guest) => frame(close_code::ERROR),
        Err(Over::Ended(reason)) => reason.close_frame(),
        Err(Over::Client) => return,
    };
    let _ = timeout(SILENCE, sender.send(Message::Close(Some(frame)))).await;
}

impl Session {
    /// Passes on bytes in both directions until both have ended.
    async fn run(&mut self, sender: &mut SplitSink<WebSocket, Message>) -> Result<(), Over> {
        let mut ping = tokio::time::interval(PING_EVERY);
        loop {
            let message = tokio::select! {
                output = self.tunnel.read() => match output.map_err(|_| Over::Guest)? {
                    Some(bytes) => Message::Binary(bytes.into()),
                    None => break,
                },
                message = self.receiver.next(), if self.tunnel.accepts_input() => {
                    self.receive(message)?;
                    continue;
                }
                _ = ping.tick() => self.ping()?,
            };
            self.deliver(sender, message).await?;
        }
        let text = serde_json::to_string(&PortMessage::End).unwrap_or_default();
        self.deliver(sender, Message::Text(text.into())).await?;
        while !self.has_client_ended || self.tunnel.has_unsent() {
            let message = tokio::select! {
                served = self.serve_client() => {
                    served?;
                    continue;
                }
                _ = ping.tick() => self.ping()?,
            };
            self.deliver(sender, message).await?;
        }
        Ok(())
    }

    /// The message by which a client proves that it is there, unless it has not for too long.
    fn ping(&mut self) -> Result<Message, Over> {
        if !self.tunnel.accepts_input() {
            // Its answers are behind its input, which nobody takes.
            self.last_message = Instant::now();
        }
        match self.last_message.elapsed() > SILENCE {
            true => Err(Over::Client),
            false => Ok(Message::Ping(Bytes::new())),
        }
    }

    /// Sends a message to the client, and serves the other direction meanwhile.
    async fn deliver(
        &mut self,
        sender: &mut SplitSink<WebSocket, Message>,
        message: Message,
    ) -> Result<(), Over> {
        let mut sending = std::pin::pin!(sender.send(message));
        loop {
            tokio::select! {
                sent = &mut sending => return sent.map_err(|_| Over::Client),
                served = self.serve_client() => served?,
            }
        }
    }

    /// Waits until something was received of the client, or was sent to the guest.
    async fn serve_client(&mut self) -> Result<(), Over> {
        tokio::select! {
            message = self.receiver.next(), if self.tunnel.accepts_input() => self.receive(message),
            sent = self.tunnel.send(), if self.tunnel.has_unsent() => {
                sent.map_err(|_| Over::Guest)
            }
        }
    }

    /// Takes a message of the client.
    fn receive(&mut self, message: Option<Result<Message, axum::Error>>) -> Result<(), Over> {
        self.last_message = Instant::now();
        match message {
            Some(Ok(Message::Binary(bytes))) => self.tunnel.write(&bytes),
            Some(Ok(Message::Text(text))) => {
                // Other messages are ignored, and so is what follows the end.
                if let Ok(PortMessage::End) = serde_json::from_str(&text) {
                    self.has_client_ended = true;
                    self.tunnel.end();
                }
            }
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Over::Client),
        }
        Ok(())
    }
}
