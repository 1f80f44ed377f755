//! Tracks a command's output as it arrives, without I/O: the position of received bytes, and the
//! acknowledgements to send.

use crate::OUTPUT_WINDOW;
use crate::error::ClientError;
use crate::messages::{Acknowledge, Exited, Output, Stream, from_agent};

/// Output is acknowledged at least every so many bytes, well before the agent's window is full.
const ACKNOWLEDGE_EVERY: u64 = OUTPUT_WINDOW as u64 / 4;

/// An event of a running command.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The command printed bytes.
    Output(Stream, Vec<u8>),
    /// This number of bytes of a detached command's output was dropped.
    Lost(Stream, u64),
    /// The command ended.
    Exited(Exited),
}

/// A command's end, and its output.
#[derive(Clone, Debug, PartialEq)]
pub struct Collected {
    /// The command's end.
    pub exited: Exited,
    /// The whole standard output.
    pub stdout: Vec<u8>,
    /// The whole standard error.
    pub stderr: Vec<u8>,
}

/// The position up to which a command's output has arrived, and the position that the agent knows.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputCursors {
    arrived: Acknowledge,
    acknowledged: u64,
}

impl OutputCursors {
    /// Makes the cursors of a command whose output is read from `arrived` on.
    pub fn from(arrived: Acknowledge) -> Self {
        Self {
            arrived,
            acknowledged: 0,
        }
    }

    /// The number of bytes of each output that have arrived.
    pub fn arrived(&self) -> Acknowledge {
        self.arrived
    }

    /// The acknowledgement to send before waiting for the next message, if one is due.
    pub fn acknowledgement(&self) -> Option<Acknowledge> {
        let unknown = total(self.arrived).saturating_sub(self.acknowledged);
        (unknown >= ACKNOWLEDGE_EVERY).then_some(self.arrived)
    }

    /// Records that `arrived` was sent.
    pub fn acknowledged(&mut self, arrived: Acknowledge) {
        self.acknowledged = total(arrived);
    }

    /// Interprets a message.
    ///
    /// # Errors
    /// [`ClientError::OutOfTurn`] for a message that is not about a running command.
    pub fn event(&mut self, message: from_agent::Kind) -> Result<Event, ClientError> {
        match message {
            from_agent::Kind::Exited(exited) => Ok(Event::Exited(exited)),
            from_agent::Kind::Output(output) => Ok(self.output(output)),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    fn output(&mut self, output: Output) -> Event {
        let stream = output.stream();
        let cursor = match stream {
            Stream::Stdout => &mut self.arrived.stdout_cursor,
            Stream::Stderr => &mut self.arrived.stderr_cursor,
        };
        let gap = output.cursor.saturating_sub(*cursor);
        *cursor = output.cursor.saturating_add(output.data.len() as u64);
        match gap > 0 && output.data.is_empty() {
            true => Event::Lost(stream, gap),
            false => Event::Output(stream, output.data),
        }
    }
}

fn total(arrived: Acknowledge) -> u64 {
    arrived.stdout_cursor.saturating_add(arrived.stderr_cursor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_at_the_end_of_their_range_do_no_harm() {
        let mut cursors = OutputCursors::default();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let event = cursors.event(from_agent::Kind::Output(Output {
                stream: stream.into(),
                cursor: u64::MAX,
                data: vec![1, 2],
            }));
            assert_eq!(event.unwrap(), Event::Output(stream, vec![1, 2]));
        }
        cursors.acknowledged(cursors.acknowledgement().unwrap());
        assert!(cursors.acknowledgement().is_none());
    }

    #[test]
    fn output_is_acknowledged_well_before_the_window_is_full() {
        let mut cursors = OutputCursors::default();
        let mut arrive = |cursor, len| {
            let data = vec![0; len];
            let output = Output {
                stream: Stream::Stdout.into(),
                cursor,
                data,
            };
            cursors.event(from_agent::Kind::Output(output)).unwrap();
            let due = cursors.acknowledgement()?;
            cursors.acknowledged(due);
            Some(due.stdout_cursor)
        };
        assert_eq!(arrive(0, 1000), None);
        assert_eq!(arrive(1000, ACKNOWLEDGE_EVERY as usize), Some(66536));
        assert_eq!(arrive(66536, 1000), None);
    }
}
