//! A command that runs in a guest.

use std::collections::BTreeSet;

use agent_proto::deadline::{ByteLimit, Deadline};
use agent_proto::error::ClientError;
use agent_proto::exchange::{FAREWELL_LIMIT, Timing};
use agent_proto::exec::{Collected, Event, OutputCursors};
use agent_proto::messages::{Acknowledge, Empty, Exited, Started, Stream, TerminalSize, from_host};

use crate::Result;
use crate::input::{PendingInput, Piece};
use crate::wire::{Wire, within};

/// A command that runs in the guest. Unless it is detached, it ends when this value is dropped.
///
/// Input, signals and sizes that are given to it are sent while [`Running::next_event`] is awaited.
pub struct Running {
    wire: Wire,
    started: Started,
    cursors: OutputCursors,
    input: PendingInput,
    signals: BTreeSet<i32>,
    size: Option<TerminalSize>,
    exited: Option<Exited>,
    is_farewell_sent: bool,
    acknowledges: Acknowledges,
}

/// Who decides up to where output counts as arrived.
enum Acknowledges {
    /// What was received.
    Received,
    /// The caller, who has said this and not sent it yet.
    Caller(Option<Acknowledge>),
}

impl Running {
    pub(crate) fn new(mut wire: Wire, started: Started, arrived: Acknowledge) -> Self {
        // What a former connection has sent counts, too.
        wire.credit.spend(started.input_received);
        wire.credit.taken(started.input_taken);
        Self {
            wire,
            started,
            cursors: OutputCursors::from(arrived),
            input: PendingInput::after(started.input_received),
            signals: BTreeSet::new(),
            size: None,
            exited: None,
            is_farewell_sent: false,
            acknowledges: Acknowledges::Received,
        }
    }

    /// Lets the caller say by [`Running::acknowledge`] up to where output has arrived, because it
    /// passes output on and may lose it on the way. The command waits when too much was not
    /// acknowledged.
    #[must_use]
    pub fn acknowledged_by_caller(mut self) -> Self {
        self.acknowledges = Acknowledges::Caller(None);
        self
    }

    /// Says that the output up to here has arrived where it is used.
    pub fn acknowledge(&mut self, arrived: Acknowledge) {
        if let Acknowledges::Caller(waiting) = &mut self.acknowledges {
            *waiting = Some(arrived);
        }
    }

    /// Goes on for `former`, whose connection to the same command was lost: input that the command has
    /// not received is sent again, and so is what waited to be sent.
    #[must_use]
    pub fn in_place_of(mut self, former: &mut Self) -> Self {
        let input = std::mem::take(&mut former.input);
        self.input = PendingInput::resumed(input, self.started.input_received);
        self.signals = std::mem::take(&mut former.signals);
        self.size = former.size.take();
        if matches!(former.acknowledges, Acknowledges::Caller(_)) {
            self.acknowledges = Acknowledges::Caller(None);
        }
        self
    }

    /// How the agent names it.
    pub fn started(&self) -> Started {
        self.started
    }

    /// Sets another deadline for the rest of the command.
    pub fn set_deadline(&mut self, deadline: Deadline) {
        self.wire.set_timing(Timing::Exchange(deadline));
    }

    /// The command may run and be silent for as long as it likes, as an interactive one or one
    /// that is only watched does. A message that the agent has begun, or that it has to take, is
    /// still given up after two minutes.
    #[must_use]
    pub fn streaming(mut self) -> Self {
        self.wire.set_timing(Timing::Stream);
        self
    }

    /// How much of its output has arrived: with it and the command's id, a later connection can go
    /// on where this one was lost.
    pub fn arrived(&self) -> Acknowledge {
        self.cursors.arrived()
    }

    /// Whether the command has taken so much of its input that more should be given to
    /// [`Running::write`].
    pub fn accepts_input(&self) -> bool {
        self.input.has_room()
    }

    /// Gives input to the command. It is kept until it is sent, so the caller bounds it by
    /// [`Running::accepts_input`]. Input that the command does not want is dropped.
    pub fn write(&mut self, bytes: &[u8]) {
        self.input.push(bytes);
    }

    /// Ends the command's input, after what was written before.
    pub fn end_input(&mut self) {
        self.input.end();
    }

    /// Sends a signal to the command's process group. A signal that already waits to be sent is
    /// sent once, and one that does not exist is not sent.
    pub fn signal(&mut self, signal: i32) {
        if (1..=64).contains(&signal) {
            self.signals.insert(signal);
        }
    }

    /// Sets the size of the command's terminal. Of several sizes the last one is sent.
    pub fn resize(&mut self, size: TerminalSize) {
        self.size = Some(size);
    }

    /// What happens next. After the end this is the end again.
    ///
    /// # Errors
    /// Where the connection is lost or its deadline passes. The command has then ended, or ends
    /// soon, unless it is detached.
    pub async fn next_event(&mut self) -> Result<Event> {
        while self.exited.is_none() {
            if let Some(message) = self.wire.next_message()? {
                match self.cursors.event(message)? {
                    Event::Exited(exited) => self.exited = Some(exited),
                    event => return Ok(event),
                }
            } else {
                self.send_next()?;
                self.wire.progress().await?;
            }
        }
        // So that the agent can forget the command; it may have ended already.
        let deadline = Deadline::after(FAREWELL_LIMIT);
        let _ = within(Some(deadline), self.say_farewell()).await;
        match self.exited {
            Some(exited) => Ok(Event::Exited(exited)),
            None => Err(ClientError::OutOfTurn),
        }
    }

    async fn say_farewell(&mut self) -> Result<()> {
        self.wire.flush().await?;
        if !self.is_farewell_sent {
            self.is_farewell_sent = true;
            let arrived = match &mut self.acknowledges {
                Acknowledges::Received => Some(self.cursors.arrived()),
                Acknowledges::Caller(waiting) => waiting.take(),
            };
            if let Some(arrived) = arrived {
                self.wire.queue(from_host::Kind::Acknowledge(arrived))?;
            }
        }
        self.wire.flush().await
    }

    /// Lets the message be sent that is most urgent, where none is being sent.
    fn send_next(&mut self) -> Result<()> {
        if self.wire.is_write_lost() {
            self.input.discard();
        }
        if !self.wire.is_idle() {
            return Ok(());
        }
        let due = match &mut self.acknowledges {
            Acknowledges::Received => self.cursors.acknowledgement(),
            Acknowledges::Caller(waiting) => waiting.take(),
        };
        if let Some(arrived) = due {
            self.cursors.acknowledged(arrived);
            return self.wire.queue(from_host::Kind::Acknowledge(arrived));
        }
        if let Some(signal) = self.signals.pop_first() {
            return self.wire.queue(from_host::Kind::Signal(signal));
        }
        if let Some(size) = self.size.take() {
            return self.wire.queue(from_host::Kind::Resize(size));
        }
        match self.input.take(self.wire.credit.available()) {
            Some(Piece::Bytes(bytes)) => {
                self.wire.credit.spend(bytes.len() as u64);
                self.wire.queue(from_host::Kind::Stdin(bytes))
            }
            Some(Piece::End) => self.wire.queue(from_host::Kind::StdinEnd(Empty {})),
            None => Ok(()),
        }
    }

    /// Waits for the end and gathers all output, which is kept in memory.
    ///
    /// # Errors
    /// [`ClientError::TooMuch`] where both outputs together are longer than `limit`.
    pub async fn collect(mut self, limit: ByteLimit) -> Result<Collected> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let (kept, data) = match self.next_event().await? {
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
