//! A command that runs in a guest.

use std::sync::Arc;

use super::outgoing::Outgoing;
use super::{Connection, Result};
use crate::CHUNK;
use crate::deadline::{ByteLimit, Deadline};
use crate::error::ClientError;
use crate::exchange::{FAREWELL_LIMIT, Timing};
use crate::exec::{Collected, Event, OutputCursors};
use crate::messages::{Acknowledge, Empty, Started, Stream, TerminalSize, from_host};

/// A command that runs in the guest.
pub struct Running {
    connection: Connection,
    started: Started,
    cursors: OutputCursors,
}

impl Running {
    pub(super) fn new(connection: Connection, started: Started, arrived: Acknowledge) -> Self {
        Self {
            connection,
            started,
            cursors: OutputCursors::from(arrived),
        }
    }

    /// The command's id at the agent.
    pub fn started(&self) -> Started {
        self.started
    }

    /// Sets another deadline for the rest of the command.
    pub fn set_deadline(&mut self, deadline: Deadline) {
        self.connection.set_deadline(deadline);
    }

    /// Removes the deadline: the command may run and be silent without limit, as an interactive one
    /// or one that is only watched does. A message that has begun, in either direction, must still
    /// be complete within two minutes.
    #[must_use]
    pub fn streaming(self) -> Self {
        self.connection.outgoing.set_timing(Timing::Stream);
        self
    }

    /// The positions up to which output has arrived. With these and the command's id, a later
    /// connection can continue where this one was lost.
    pub fn arrived(&self) -> Acknowledge {
        self.cursors.arrived()
    }

    /// The sending side, for another thread: input, signals, the terminal's size.
    pub fn input(&self) -> Input {
        Input {
            outgoing: Arc::clone(&self.connection.outgoing),
        }
    }

    /// Waits for the next event. Events that were returned before count as arrived.
    ///
    /// # Errors
    /// [`ClientError::Late`] if the deadline has passed, or a stream stalls.
    pub fn next_event(&mut self) -> Result<Event> {
        let message = loop {
            // An acknowledgement that had to wait is tried again after each message. An agent whose
            // buffer is full sends nothing more until it has come.
            self.acknowledge()?;
            if let Some(message) = self.connection.receive_or_credit()? {
                break message;
            }
        };
        let event = self.cursors.event(message)?;
        if let Event::Exited(_) = event {
            // This lets the agent drop the command's record. The agent may have ended already.
            let arrived = from_host::Kind::Acknowledge(self.cursors.arrived());
            let deadline = Deadline::after(FAREWELL_LIMIT);
            let _ = self.connection.outgoing.send_by(arrived, deadline);
        }
        Ok(event)
    }

    /// Acknowledges the arrived output if that is due. An agent that sends but does not read gets
    /// no acknowledgement, and does not block reading.
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

    /// Waits for the end and collects all output in memory.
    ///
    /// # Errors
    /// [`ClientError::TooMuch`] if both outputs together are longer than `limit`.
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
        // A thread that is blocked in sending input would wait forever.
        self.connection.outgoing.lose_credit();
    }
}

/// The sending side of a running command. Input is accepted only while a thread waits for the
/// command's events.
#[derive(Clone)]
pub struct Input {
    outgoing: Arc<Outgoing>,
}

impl Input {
    /// Sends input to the command; blocks while the command reads none.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        bytes.chunks(CHUNK).try_for_each(|chunk| {
            self.outgoing.take_credit(chunk.len() as u64)?;
            self.outgoing.send(from_host::Kind::Stdin(chunk.to_vec()))
        })
    }

    /// Ends the command's input.
    pub fn end(&self) -> Result<()> {
        self.outgoing.send(from_host::Kind::StdinEnd(Empty {}))
    }

    /// Sends a signal to the command's process group.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.outgoing.send(from_host::Kind::Signal(signal))
    }

    /// Sets the terminal's size.
    pub fn resize(&self, size: TerminalSize) -> Result<()> {
        self.outgoing.send(from_host::Kind::Resize(size))
    }

    /// Closes the connection, from any thread; [`Running::next_event`] returns an error.
    pub fn disconnect(&self) {
        self.outgoing.disconnect();
    }
}
