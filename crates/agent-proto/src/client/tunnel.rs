//! A connection to a TCP port in a guest, with each direction for a separate thread.

use std::sync::Arc;

use super::outgoing::Outgoing;
use super::{Connection, Result};
use crate::CHUNK;
use crate::exchange::{Timing, tunnel_output};
use crate::messages::{Empty, from_host};

/// The receiving side of a connection in the guest.
pub struct TunnelOut {
    connection: Connection,
}

impl TunnelOut {
    /// Splits a connection that the agent has just made. From here on it may be silent, as streams
    /// may.
    pub(super) fn split(connection: Connection) -> (Self, TunnelIn) {
        connection.outgoing.set_timing(Timing::Stream);
        let outgoing = Arc::clone(&connection.outgoing);
        (Self { connection }, TunnelIn { outgoing })
    }

    /// The next bytes; empty at the end. The other direction continues then.
    pub fn read(&mut self) -> Result<Option<Vec<u8>>> {
        tunnel_output(self.connection.receive()?)
    }
}

/// The sending side of a connection in the guest.
#[derive(Clone)]
pub struct TunnelIn {
    outgoing: Arc<Outgoing>,
}

impl TunnelIn {
    /// Sends bytes; blocks while they are not received.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        bytes
            .chunks(CHUNK)
            .try_for_each(|chunk| self.outgoing.send(from_host::Kind::Data(chunk.to_vec())))
    }

    /// Sends the end of the data.
    pub fn end(&self) -> Result<()> {
        self.outgoing.send(from_host::Kind::DataEnd(Empty {}))
    }

    /// Closes the connection, from any thread; reads and writes in progress return an error.
    pub fn disconnect(&self) {
        self.outgoing.disconnect();
    }
}
