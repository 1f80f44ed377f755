//! WebSockets to the server, over the same kind of connection as its other requests.

use anyhow::{Context as _, Result};
use army_api::Client;
use serde::Serialize;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

/// A WebSocket to the server.
pub(super) type Socket = WebSocketStream<reqwest::Upgraded>;

/// Opens a WebSocket. A refusal by the server is the error.
pub(super) async fn open(client: &Client, path: &str, query: &impl Serialize) -> Result<Socket> {
    let key = generate_key();
    let answer = client.web_socket(path, query, &key).await?;
    let accepted = answer.headers().get("sec-websocket-accept");
    anyhow::ensure!(
        accepted.is_some_and(|it| it.as_bytes() == derive_accept_key(key.as_bytes()).as_bytes()),
        "{} does not answer as a WebSocket server: is there a proxy before it?",
        client.url()
    );
    let stream = answer.upgrade().await.context("the connection was lost")?;
    Ok(WebSocketStream::from_raw_socket(stream, Role::Client, None).await)
}
