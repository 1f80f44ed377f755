//! Passes on the bytes between a controller and the agent in a guest.

use std::time::Duration;

use agent_client::AgentSocket;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, sink, split};

/// How long a controller may take to read the last bytes of an agent.
const LINGER: Duration = Duration::from_secs(5);

/// Passes on `greeting`, and then bytes in both directions until either side ends. No more than a
/// buffer of each direction is held.
///
/// The agent's protocol never ends one direction alone, so a controller that has gone away ends the
/// connection to the agent at once, even where the agent would not.
pub(crate) async fn relay(far: impl AsyncRead + AsyncWrite, near: AgentSocket, greeting: Vec<u8>) {
    let (mut from_far, mut to_far) = split(far);
    let (mut from_near, mut to_near) = split(near);
    let to_agent = async {
        if copy(&mut from_far, &mut to_near).await.is_err() {
            // The agent takes no more. Its last bytes are on their way, and data of the controller
            // that nobody reads would have the kernel drop them.
            let _ = copy(&mut from_far, &mut sink()).await;
        }
    };
    let to_controller = async {
        if to_far.write_all(&greeting).await.is_ok() {
            let _ = copy(&mut from_near, &mut to_far).await;
            let _ = to_far.shutdown().await;
            tokio::time::sleep(LINGER).await;
        }
    };
    tokio::select! {
        () = to_agent => {}
        () = to_controller => {}
    }
}
