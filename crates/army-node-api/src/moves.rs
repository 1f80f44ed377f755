//! The streams over which VMs move from node to node.

use std::io;

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};

/// The bytes that are held in each direction between a connection and a VM's process.
const BUFFER: usize = 256 << 10;

/// A connection to another node.
pub type ByteStream = Box<dyn Duplex>;

/// A stream that can be read and written.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Duplex for T {}

/// Passes on bytes in both directions until both have ended, or one has failed. The ends of the stream
/// themselves give up a connection that makes no progress.
///
/// # Errors
/// Where one of the streams fails.
pub async fn carry(mut far: ByteStream, mut near: impl Duplex) -> io::Result<()> {
    copy_bidirectional_with_sizes(&mut far, &mut near, BUFFER, BUFFER)
        .await
        .map(drop)
}
