//! Ports of guests: a TCP connection in a guest, over a WebSocket.
//!
//! Binary messages are the bytes of the connection, and text messages are [`PortMessage`]s. The two
//! directions are independent, because a server that waits for its client to read must continue to
//! read from the client.

use agent_client::Tunnel;
use army_api::exec::PortMessage;
use army_api::keys::Role;
use army_api::{Problem, ProblemKind};
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use axum::response::Response;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};

use super::auth::Caller;
use super::extract::{Path, Upgrade};
use super::{AGENT_LIMIT, Answer, App};
use army_controller::Error;

/// The subprotocol that a browser offers beside its key. The response has to select one of those
/// that were offered.
const SUBPROTOCOL: &str = "army.port";
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
    let connection = app.controller.agent(&vm, AGENT_LIMIT).await?;
    let tunnel = connection.connect(port).await.map_err(Error::from)?;
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| serve(socket, tunnel)))
}

/// A client, and the connection in the guest that it uses.
struct Session {
    receiver: SplitStream<WebSocket>,
    tunnel: Tunnel,
    /// The client has no more bytes to send.
    has_client_ended: bool,
}

/// Why a session is over before both sides have ended.
enum Over {
    /// The client has disconnected.
    Client,
    /// The connection in the guest is lost.
    Guest,
}

/// Serves a connection until both sides have ended, or either is lost. Dropping the tunnel then ends
/// the connection in the guest.
async fn serve(socket: WebSocket, tunnel: Tunnel) {
    let (mut sender, receiver) = socket.split();
    let mut session = Session {
        receiver,
        tunnel,
        has_client_ended: false,
    };
    let code = match session.run(&mut sender).await {
        Ok(()) => close_code::NORMAL,
        Err(Over::Guest) => close_code::ERROR,
        Err(Over::Client) => return,
    };
    drop(session);
    let frame = CloseFrame {
        code,
        reason: "".into(),
    };
    let _ = sender.send(Message::Close(Some(frame))).await;
}

impl Session {
    /// Passes on bytes in both directions until both have ended.
    async fn run(&mut self, sender: &mut SplitSink<WebSocket, Message>) -> Result<(), Over> {
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
            };
            self.deliver(sender, message).await?;
        }
        let text = serde_json::to_string(&PortMessage::End).unwrap_or_default();
        self.deliver(sender, Message::Text(text.into())).await?;
        while !self.has_client_ended || self.tunnel.has_unsent() {
            self.serve_client().await?;
        }
        Ok(())
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
