//! Connections to the agents in guests.

use std::os::unix::net::UnixStream;

use agent_proto::client::Connection;

use crate::{Deadline, Result};

/// Marks a VM as used while it lives: a VM that is in use is not idle.
pub struct InUse {
    /// Dropping it ends the use.
    _guard: Option<Box<dyn Send + Sync>>,
}

impl InUse {
    /// The use ends when `guard` is dropped.
    pub fn until_dropped(guard: impl Send + Sync + 'static) -> Self {
        Self {
            _guard: Some(Box::new(guard)),
        }
    }

    /// The VM's node tracks the use by the connection.
    pub fn tracked_by_node() -> Self {
        Self { _guard: None }
    }
}

/// A stream to the agent in a guest, which no request has been sent on.
pub struct AgentStream {
    stream: Stream,
    in_use: InUse,
}

enum Stream {
    /// The agent's greeting was read.
    Greeted(Connection),
    /// The agent's greeting is the first that comes out of the stream.
    Raw(UnixStream),
}

impl AgentStream {
    /// A connection whose greeting was read.
    pub fn greeted(connection: Connection, in_use: InUse) -> Self {
        Self {
            stream: Stream::Greeted(connection),
            in_use,
        }
    }

    /// A stream whose first bytes are the agent's greeting.
    pub fn raw(stream: UnixStream, in_use: InUse) -> Self {
        Self {
            stream: Stream::Raw(stream),
            in_use,
        }
    }

    /// The connection to the agent, with `deadline` for its one request. Blocks until the greeting
    /// was read.
    ///
    /// # Errors
    /// [`ErrorKind::GuestUnavailable`](crate::ErrorKind::GuestUnavailable) where the agent does not
    /// greet before the deadline.
    pub fn open(self, deadline: Deadline) -> Result<(Connection, InUse)> {
        let mut connection = match self.stream {
            Stream::Greeted(connection) => connection,
            Stream::Raw(stream) => Connection::greet(stream, deadline)?,
        };
        connection.set_deadline(deadline);
        Ok((connection, self.in_use))
    }

    /// The stream, and what has been read from it already, for a process that passes both on.
    ///
    /// # Errors
    /// Where the stream cannot be made to block without a limit of time.
    pub fn into_parts(self) -> Result<(UnixStream, Vec<u8>, InUse)> {
        match self.stream {
            Stream::Greeted(connection) => {
                let (stream, greeting) = connection.into_stream()?;
                Ok((stream, greeting, self.in_use))
            }
            Stream::Raw(stream) => Ok((stream, Vec::new(), self.in_use)),
        }
    }
}
