//! Streams to the agents in guests.

use agent_client::{AgentSocket, Connection};

use crate::{Deadline, Result};

/// A stream to the agent in a guest, which no request has been sent on. Its VM counts as used while
/// the stream lives, or the connection that is made of it, or what becomes of that.
pub struct AgentStream {
    stream: Stream,
}

enum Stream {
    /// The agent's greeting was read.
    Greeted(Connection),
    /// The agent's greeting is the first that comes out of the stream.
    Raw(AgentSocket),
}

impl AgentStream {
    /// A connection whose greeting was read.
    pub fn greeted(connection: Connection) -> Self {
        Self {
            stream: Stream::Greeted(connection),
        }
    }

    /// A stream whose first bytes are the agent's greeting.
    pub fn raw(socket: AgentSocket) -> Self {
        Self {
            stream: Stream::Raw(socket),
        }
    }

    /// The connection to the agent, with `deadline` for its one request, once the greeting was
    /// read.
    ///
    /// # Errors
    /// [`ErrorKind::GuestUnavailable`](crate::ErrorKind::GuestUnavailable) where the agent does not
    /// greet before the deadline.
    pub async fn open(self, deadline: Deadline) -> Result<Connection> {
        let mut connection = match self.stream {
            Stream::Greeted(connection) => connection,
            Stream::Raw(socket) => Connection::greet(socket, deadline).await?,
        };
        connection.set_deadline(deadline);
        Ok(connection)
    }

    /// The stream, and what has been read from it already, for a process that passes both on.
    ///
    /// # Errors
    /// Where the greeting cannot be encoded.
    pub fn into_parts(self) -> Result<(AgentSocket, Vec<u8>)> {
        match self.stream {
            Stream::Greeted(connection) => Ok(connection.into_socket()?),
            Stream::Raw(socket) => Ok((socket, Vec::new())),
        }
    }
}
