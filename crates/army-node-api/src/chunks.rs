//! Streams of bytes between code that blocks and code that does not.

use std::io::{self, Read, Write};
use std::time::Duration;

use axum::body::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;

/// The number of chunks that may wait for a slow reader.
const AHEAD: usize = 16;
/// The longest time that the next chunk of a body may take.
const SILENCE: Duration = Duration::from_secs(30);

/// The receiving end of a stream. An error is its last item.
pub type ChunkReceiver = mpsc::Receiver<io::Result<Bytes>>;
/// The sending end of a stream.
pub type ChunkSender = mpsc::Sender<io::Result<Bytes>>;

/// Creates a stream.
pub fn channel() -> (ChunkSender, ChunkReceiver) {
    mpsc::channel(AHEAD)
}

/// Receives a body. The stream ends with an error where the next chunk does not arrive in time, and
/// the body is dropped where its receiver is.
pub fn receive<E>(
    mut body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
) -> ChunkReceiver
where
    E: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let (sender, chunks) = channel();
    tokio::spawn(async move {
        loop {
            let chunk = match tokio::time::timeout(SILENCE, body.next()).await {
                Ok(Some(chunk)) => chunk.map_err(io::Error::other),
                Ok(None) => return,
                Err(_) => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no data arrived for {} seconds", SILENCE.as_secs()),
                )),
            };
            let is_last = chunk.is_err();
            if sender.send(chunk).await.is_err() || is_last {
                return;
            }
        }
    });
    chunks
}

/// The chunks as a stream, for the body of a message.
pub fn into_stream(
    chunks: ChunkReceiver,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    futures_util::stream::unfold(chunks, |mut chunks| async move {
        Some((chunks.recv().await?, chunks))
    })
}

/// Writes to a stream. Each write blocks until the reader has room.
pub struct ChunkWriter(pub ChunkSender);

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = Bytes::copy_from_slice(bytes);
        let sent = self.0.blocking_send(Ok(chunk));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads from a stream. Each read blocks until there is a chunk.
pub struct ChunkReader {
    receiver: ChunkReceiver,
    chunk: Bytes,
}

impl ChunkReader {
    /// Reads from `receiver`.
    pub fn new(receiver: ChunkReceiver) -> Self {
        Self {
            receiver,
            chunk: Bytes::new(),
        }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.receiver.blocking_recv() {
                Some(chunk) => self.chunk = chunk?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.chunk.len());
        buffer[..count].copy_from_slice(&self.chunk.split_to(count));
        Ok(count)
    }
}
