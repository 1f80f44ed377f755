//! A command that runs in a guest.

use std::sync::Arc;

use super::outgoing::Outgoing;
use super::{Connection, Result};
use crate::CHUNK;
use crate::deadline::{ByteLimit, Deadline};
use crate::error::ClientError;
use crate::exchange::{FAREWELL_LIMIT, Timing};
use crate::exec::{Event, OutputCursors};
use crate::messages::{Acknowledge, Empty, Exited, Started, Stream, TerminalSize, from_host};

/// A command that runs in the guest.
pub struct Running {
    connection: Connection,
    started: Started,
    cursors: OutputCursors,
}

/// A command's end, and what it printed before.
#[derive(Clone, Debug, PartialEq)]
pub struct Collected {
    /// How it ended.
    pub exited: Exited,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

impl Running {
    pub(super) fn new(connection: Connection, started: Started, arrived: Acknowledge) -> Self {
        Self {
            connection,
            started,
            cursors: OutputCursors::from(arrived),
        }
    }

    /// How the agent names it.
    pub fn started(&self) -> Started {
        self.started
    }

    /// Sets another deadline for the rest of the command.
    pub fn set_deadline(&mut self, deadline: Deadline) {
        self.connection.set_deadline(deadline);
    }

    /// The command may run and be silent for as long as it likes, as an interactive one or one
    /// that is only watched does. A message that the agent has begun, or that it has to take, is
    /// still given up after two minutes.
    #[must_use]
    pub fn streaming(self) -> Self {
        self.connection.outgoing.set_timing(Timing::Stream);
        self
    }

    /// How much of its output has arrived: with it and the command's id, a later connection can go
    /// on where this one was lost.
    pub fn arrived(&self) -> Acknowledge {
        self.cursors.arrived()
    }

    /// The way in: input, signals, the terminal's size. For another thread.
    pub fn input(&self) -> Input {
        Input {
            outgoing: Arc::clone(&self.connection.outgoing),
        }
    }

    /// Waits for the next event. What was handed out before counts as arrived.
    ///
    /// # Errors
    /// [`ClientError::Late`] where the deadline has passed, or a stream stalls.
    pub fn next_event(&mut self) -> Result<Event> {
        self.acknowledge()?;
        let message = self.connection.receive()?;
        let event = self.cursors.event(message)?;
        if let Event::Exited(_) = event {
            // So that the agent can forget the command; it may have ended already.
            let arrived = from_host::Kind::Acknowledge(self.cursors.arrived());
            let deadline = Deadline::after(FAREWELL_LIMIT);
            let _ = self.connection.outgoing.send_by(arrived, deadline);
        }
        Ok(event)
    }

    /// Tells the agent what has arrived, where that is due. An agent that sends and does not read
    /// gets no answer, and does not keep us from reading.
    fn acknowledge(&mut self) -> Result<()> {
        let deadline = self.connection.outgoing.timing().of_message();
        while let Some(arrived) = self.cursors.acknowledgement() {
            let message = from_host::Kind::Acknowledge(arrived);
            if self.connection.outgoing.try_send(message)? {
                self.cursors.acknowledged(arrived);
            } else if self.connection.may_receive_by(deadline)? {
                break;
            }
        }
        Ok(())
    }

    /// Waits for the end and gathers all output, which is kept in memory.
    ///
    /// # Errors
    /// [`ClientError::TooMuch`] where both outputs together are longer than `limit`.
    pub fn collect(mut self, limit: ByteLimit) -> Result<Collected> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let (kept, data) = match self.next_event()? {
                Event::Output(Stream::Stdout, data) => (&mut stdout, data),
                Event::Output(Stream::Stderr, data) => (&mut stderr, data),
                Event::Lost(..) => continue,
                Event::Exited(exited) => {
                    return Ok(Collected {
                        exited,
                        stdout,
                        stderr,
                    });
                }
            };
            kept.extend_from_slice(&data);
            if (stdout.len() + stderr.len()) as u64 > limit.bytes() {
                let limit = format!("{} bytes of output", limit.bytes());
                return Err(ClientError::TooMuch(limit));
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A thread that waits to send input would wait for ever.
        self.connection.outgoing.lose_credit();
    }
}

/// The way into a running command. Input is taken only while somebody waits for the command's
/// events.
#[derive(Clone)]
pub struct Input {
    outgoing: Arc<Outgoing>,
}

impl Input {
    /// Input for the command; waits while it takes none.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        bytes.chunks(CHUNK).try_for_each(|chunk| {
            self.outgoing.take_credit(chunk.len() as u64)?;
            self.outgoing.send(from_host::Kind::Stdin(chunk.to_vec()))
        })
    }

    /// The end of its input.
    pub fn end(&self) -> Result<()> {
        self.outgoing.send(from_host::Kind::StdinEnd(Empty {}))
    }

    /// A signal for its process group.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.outgoing.send(from_host::Kind::Signal(signal))
    }

    /// The terminal's new size.
    pub fn resize(&self, size: TerminalSize) -> Result<()> {
        self.outgoing.send(from_host::Kind::Resize(size))
    }

    /// Drops the connection, from any thread; [`Running::next_event`] ends with an error.
    pub fn disconnect(&self) {
        self.outgoing.disconnect();
    }
}
