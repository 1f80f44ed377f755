//! The stream of bytes to an agent, whatever carries it.

use std::fmt;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use agent_proto::deadline::Deadline;
use agent_proto::error::ClientError;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

use crate::Result;
use crate::wire::within;

/// The pause between two attempts to connect to a socket whose backlog is full. The kernel does not
/// notify anybody of room in it.
const BACKLOG_PAUSE: Duration = Duration::from_millis(5);

/// What can carry the bytes: a Unix socket, or a connection of HTTP that was upgraded.
pub trait Transport: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Transport for T {}

/// A stream to an agent. Dropping it closes the connection.
pub struct AgentSocket {
    transport: Box<dyn Transport>,
    /// Dropped with the stream.
    kept: Vec<Box<dyn Send>>,
}

impl AgentSocket {
    /// A stream over `transport`.
    pub fn new(transport: impl Transport) -> Self {
        Self {
            transport: Box::new(transport),
            kept: Vec::new(),
        }
    }

    /// Keeps `guard` until the stream is dropped.
    #[must_use]
    pub fn keeping(mut self, guard: impl Send + 'static) -> Self {
        self.kept.push(Box::new(guard));
        self
    }
}

impl fmt::Debug for AgentSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentSocket").finish_non_exhaustive()
    }
}

impl AsyncRead for AgentSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_read(context, buffer)
    }
}

impl AsyncWrite for AgentSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.transport).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_shutdown(context)
    }
}

/// Connects to the Unix socket at `path`, whose owner may not accept.
pub(crate) async fn connect(path: &Path, deadline: Deadline) -> Result<UnixStream> {
    let connected = async {
        loop {
            match UnixStream::connect(path).await {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(BACKLOG_PAUSE).await;
                }
                Ok(stream) => return Ok(stream),
                Err(source) => {
                    return Err(ClientError::Connect {
                        path: path.display().to_string(),
                        source,
                    });
                }
            }
        }
    };
    within(Some(deadline), connected).await
}
