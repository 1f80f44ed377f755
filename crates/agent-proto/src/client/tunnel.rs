//! A connection to a TCP port in a guest: both directions, each for a thread of its own.

use std::sync::Arc;

use super::outgoing::Outgoing;
use super::{Connection, Result};
use crate::CHUNK;
use crate::exchange::{Timing, tunnel_output};
use crate::messages::{Empty, from_host};

/// What comes out of a connection in the guest.
pub struct TunnelOut {
    connection: Connection,
}

impl TunnelOut {
    /// Both directions of a connection that the agent has just made. It may be silent from here
    /// on, as streams may.
    pub(super) fn split(connection: Connection) -> (Self, TunnelIn) {
        connection.outgoing.set_timing(Timing::Stream);
        let outgoing = Arc::clone(&connection.outgoing);
        (Self { connection }, TunnelIn { outgoing })
    }

    /// The next bytes; none at their end. The other direction goes on then.
    pub fn read(&mut self) -> Result<Option<Vec<u8>>> {
        tunnel_output(self.connection.receive()?)
    }
}

/// The way into a connection in the guest.
#[derive(Clone)]
pub struct TunnelIn {
    outgoing: Arc<Outgoing>,
}

impl TunnelIn {
    /// Sends bytes; waits while nobody takes them.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        bytes
            .chunks(CHUNK)
            .try_for_each(|chunk| self.outgoing.send(from_host::Kind::Data(chunk.to_vec())))
    }

    /// The end of what is sent.
    pub fn end(&self) -> Result<()> {
        self.outgoing.send(from_host::Kind::DataEnd(Empty {}))
    }

    /// Drops the connection, from any thread; whoever reads or writes gets an error.
    pub fn disconnect(&self) {
        self.outgoing.disconnect();
    }
}
