//! A connection to a TCP port in a guest.

use agent_proto::exchange::{Timing, tunnel_output};
use agent_proto::messages::{Empty, from_host};

use crate::Result;
use crate::input::{PendingInput, Piece};
use crate::wire::Wire;

/// A connection to a TCP port in a guest, which ends when this value is dropped. It may be silent,
/// as streams may.
///
/// The two directions are independent: [`Tunnel::read`] also sends what was written, and
/// [`Tunnel::send`] does only that, for a caller that has no room for more output.
pub struct Tunnel {
    wire: Wire,
    input: PendingInput,
    is_read_to_end: bool,
}

impl Tunnel {
    pub(crate) fn new(mut wire: Wire) -> Self {
        wire.set_timing(Timing::Stream);
        Self {
            wire,
            input: PendingInput::default(),
            is_read_to_end: false,
        }
    }

    /// Whether there is room for more of what is written.
    pub fn accepts_input(&self) -> bool {
        self.input.has_room()
    }

    /// Whether something that was written is not sent yet.
    pub fn has_unsent(&self) -> bool {
        !self.input.is_empty() || !self.wire.is_idle()
    }

    /// Gives bytes to the connection. They are kept until they are sent, so the caller bounds them
    /// by [`Tunnel::accepts_input`].
    pub fn write(&mut self, bytes: &[u8]) {
        self.input.push(bytes);
    }

    /// Ends what is written. The other direction goes on.
    pub fn end(&mut self) {
        self.input.end();
    }

    /// The next bytes; `None` at their end, and from then on. The other direction goes on then.
    ///
    /// # Errors
    /// Where the connection is lost.
    pub async fn read(&mut self) -> Result<Option<Vec<u8>>> {
        if self.is_read_to_end {
            return Ok(None);
        }
        loop {
            if let Some(message) = self.wire.next_message()? {
                let output = tunnel_output(message)?;
                self.is_read_to_end = output.is_none();
                return Ok(output);
            }
            self.queue_next()?;
            self.wire.progress().await?;
        }
    }

    /// Sends all that was written, and reads nothing. Where the guest takes no more, the rest is
    /// dropped, and what it has sent can still be read.
    ///
    /// # Errors
    /// Where the guest is silent about what it was sent for two minutes.
    pub async fn send(&mut self) -> Result<()> {
        while self.has_unsent() {
            self.queue_next()?;
            self.wire.flush().await?;
        }
        Ok(())
    }

    fn queue_next(&mut self) -> Result<()> {
        if self.wire.is_write_lost() {
            self.input.discard();
        }
        if !self.wire.is_idle() {
            return Ok(());
        }
        match self.input.take(u64::MAX) {
            Some(Piece::Bytes(bytes)) => self.wire.queue(from_host::Kind::Data(bytes)),
            Some(Piece::End) => self.wire.queue(from_host::Kind::DataEnd(Empty {})),
            None => Ok(()),
        }
    }
}
