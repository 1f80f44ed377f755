//! Streams between code that blocks and code that does not.

use std::io::{self, Read, Write};
use std::time::Duration;

use axum::body::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;

/// Pieces that may wait for a slow reader.
const AHEAD: usize = 16;
/// How long the next piece of a body may take.
const SILENCE: Duration = Duration::from_secs(30);

/// Pieces as they come; an error is the last.
pub type Pieces = mpsc::Receiver<io::Result<Bytes>>;
/// Where pieces are sent.
pub type Sender = mpsc::Sender<io::Result<Bytes>>;

/// What is sent comes out at the other end.
pub fn pipe() -> (Sender, Pieces) {
    mpsc::channel(AHEAD)
}

/// The pieces of a body, as they come. It ends with an error where nothing comes for a while, and
/// early when nobody reads.
pub fn pieces_of<E>(
    mut body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
) -> Pieces
where
    E: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let (sender, pieces) = pipe();
    tokio::spawn(async move {
        loop {
            let piece = match tokio::time::timeout(SILENCE, body.next()).await {
                Ok(Some(piece)) => piece.map_err(io::Error::other),
                Ok(None) => return,
                Err(_) => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "nothing came for a while",
                )),
            };
            let last = piece.is_err();
            if sender.send(piece).await.is_err() || last {
                return;
            }
        }
    });
    pieces
}

/// A body of pieces.
pub fn body_of(pieces: Pieces) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    futures_util::stream::unfold(pieces, |mut pieces| async move {
        Some((pieces.recv().await?, pieces))
    })
}

/// Blocking writes, to who reads without blocking.
pub struct Sink(pub Sender);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = Bytes::copy_from_slice(bytes);
        let sent = self.0.blocking_send(Ok(piece));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Blocking reads, of what comes without blocking.
pub struct Source {
    receiver: Pieces,
    piece: Bytes,
}

impl Source {
    /// Reads what comes out of `receiver`.
    pub fn new(receiver: Pieces) -> Self {
        Self {
            receiver,
            piece: Bytes::new(),
        }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.piece.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}
