//! The rules of an exchange with an agent, without I/O, for every client of it: what is sent, which
//! answers fit, how long each step may take, and how much may be under way.

use std::time::Duration;

use prost::Message;

use crate::deadline::{ByteLimit, Deadline};
use crate::error::ClientError;
use crate::frame::{self, FIRST_MAX_MESSAGE, Framed};
use crate::messages::{
    CommandInfo, Directory, FileChange, FileEntry, FileInfo, FromHost, Hello, Info, Request,
    Started, from_agent::Kind, from_host, request::Operation,
};
use crate::{INPUT_WINDOW, PORT};

/// How long an agent may take to accept the last message of a command that has ended.
pub const FAREWELL_LIMIT: Duration = Duration::from_secs(5);
/// The longest answer to `CONNECT` (bytes).
pub const CONNECT_ANSWER_MAX: usize = 32;

/// How long a stream's message may take from its first byte to its last, in either direction.
const STALL_LIMIT: Duration = Duration::from_secs(120);
/// More than what surrounds a request in its message (bytes).
const MESSAGE_OVERHEAD: usize = 16;
/// The slowest that a file may travel, in bytes a second: each byte moves the deadline on by the
/// time that it takes at this rate.
const MIN_FILE_RATE: u64 = 64 << 10;

type Result<T> = std::result::Result<T, ClientError>;

/// The rule for what a connection waits for.
#[derive(Clone, Copy, Debug)]
pub enum Timing {
    /// The whole exchange is over by then.
    Exchange(Deadline),
    /// A stream that lasts as long as its command. It may be silent, because a command may be, and
    /// ends when its reader does; a message that has begun must be whole within two minutes, and
    /// what is sent must be taken within the same time.
    Stream,
}

impl Timing {
    /// The deadline of a message that begins now.
    pub fn of_message(self) -> Deadline {
        match self {
            Self::Exchange(deadline) => deadline,
            Self::Stream => Deadline::after(STALL_LIMIT),
        }
    }

    /// The same rule with its deadline later by `by`, where it has one.
    #[must_use]
    pub fn extended(self, by: Duration) -> Self {
        match self {
            Self::Exchange(deadline) => Self::Exchange(deadline.extended(by)),
            Self::Stream => Self::Stream,
        }
    }
}

/// How much input may be sent to a command: at most [`INPUT_WINDOW`] more than it has taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct InputCredit {
    sent: u64,
    taken: u64,
}

impl InputCredit {
    /// How many bytes may be sent now.
    pub fn available(&self) -> u64 {
        let allowed = self.taken.saturating_add(INPUT_WINDOW as u64);
        allowed.saturating_sub(self.sent)
    }

    /// Counts bytes as sent.
    pub fn spend(&mut self, len: u64) {
        self.sent = self.sent.saturating_add(len);
    }

    /// Notes how much input the command has taken since its start.
    pub fn taken(&mut self, taken: u64) {
        self.taken = taken;
    }
}

/// A message to an agent as a frame.
///
/// # Errors
/// Where the message is too long.
pub fn encode(kind: from_host::Kind) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    frame::encode(&FromHost { kind: Some(kind) }, &mut bytes)?;
    Ok(bytes)
}

/// The request for an operation, for the agent that greeted with `hello`.
///
/// # Errors
/// [`ClientError::TooLong`] where that agent does not take a message of this length.
pub fn request(operation: Operation, hello: &Hello) -> Result<from_host::Kind> {
    let request = Request {
        operation: Some(operation),
    };
    let max = hello.max_message;
    let max = max.map_or(FIRST_MAX_MESSAGE, |max| max as usize);
    // Beside the request, a frame holds its tag and its length.
    let len = request.encoded_len() + MESSAGE_OVERHEAD;
    if len > max.min(FromHost::MAX) {
        return Err(ClientError::TooLong { len, max });
    }
    Ok(from_host::Kind::Request(request))
}

/// What is written to a VM's vsock socket to reach its agent.
pub fn connect_line() -> String {
    format!("CONNECT {PORT}\n")
}

/// The answer to [`connect_line`], as it arrives.
#[derive(Debug, Default)]
pub struct ConnectAnswer {
    read: Vec<u8>,
}

impl ConnectAnswer {
    /// Adds bytes that arrived. Returns what came after the answer once it is whole.
    ///
    /// # Errors
    /// [`ClientError::NoAgent`] where it is no consent.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        self.read.extend_from_slice(bytes);
        match self.read.iter().position(|&byte| byte == b'\n') {
            Some(end) if self.read.starts_with(b"OK ") => Ok(Some(self.read.split_off(end + 1))),
            None if self.read.len() < CONNECT_ANSWER_MAX => Ok(None),
            _ => Err(ClientError::NoAgent),
        }
    }
}

/// The greeting of an agent, from the first message that was received, or from the failure to
/// receive one.
///
/// # Errors
/// [`ClientError::NoAgent`] where the connection ended instead.
pub fn greeting(received: Result<Kind>) -> Result<Hello> {
    match received {
        Ok(Kind::Hello(hello)) => Ok(hello),
        Ok(_) => Err(ClientError::OutOfTurn),
        Err(ClientError::Lost(_)) => Err(ClientError::NoAgent),
        Err(error) => Err(error),
    }
}

/// The end of an operation that has nothing more to say.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message, as with the other answers.
pub fn done(answer: Kind) -> Result<()> {
    match answer {
        Kind::Done(_) => Ok(()),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// The answer to an exec, or to an attach.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn started(answer: Kind) -> Result<Started> {
    match answer {
        Kind::Started(started) => Ok(started),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// The answer to a question about the guest.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn info(answer: Kind) -> Result<Info> {
    match answer {
        Kind::Info(info) => Ok(info),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// The answer to a question about commands.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn commands(answer: Kind) -> Result<Vec<CommandInfo>> {
    match answer {
        Kind::Commands(list) => Ok(list.commands),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// The answer to a request for a page of a directory.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn directory(answer: Kind) -> Result<Directory> {
    match answer {
        Kind::Directory(page) => Ok(page),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// The answer to a question about a file.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn entry(answer: Kind) -> Result<FileEntry> {
    match answer {
        Kind::Entry(entry) => Ok(entry),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// The answer to a request to watch files.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn watching(answer: Kind) -> Result<()> {
    match answer {
        Kind::Watching(_) => Ok(()),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// A change of files that are watched; `None` when what is watched is gone.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn file_change(message: Kind) -> Result<Option<FileChange>> {
    match message {
        Kind::Change(change) => Ok(Some(change)),
        Kind::Done(_) => Ok(None),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// The answer to a request to connect to a port.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn connected(answer: Kind) -> Result<()> {
    match answer {
        Kind::Connected(_) => Ok(()),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// What comes out of a connection in the guest: bytes, or `None` at their end.
///
/// # Errors
/// [`ClientError::OutOfTurn`] for another message.
pub fn tunnel_output(message: Kind) -> Result<Option<Vec<u8>>> {
    match message {
        Kind::Data(data) => Ok(Some(data)),
        Kind::Done(_) => Ok(None),
        _ => Err(ClientError::OutOfTurn),
    }
}

/// A file of the guest as it arrives: how much of it may still come.
#[derive(Clone, Copy, Debug)]
pub struct IncomingFile {
    info: FileInfo,
    limit: ByteLimit,
    room: u64,
}

impl IncomingFile {
    /// A file that begins with the answer to its request.
    ///
    /// # Errors
    /// [`ClientError::OutOfTurn`] for another message.
    pub fn begin(answer: Kind, limit: ByteLimit) -> Result<Self> {
        match answer {
            Kind::File(info) => Ok(Self {
                info,
                limit,
                room: limit.bytes(),
            }),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// What the agent said of the file.
    pub fn info(&self) -> FileInfo {
        self.info
    }

    /// The next bytes of the file; `None` at its end.
    ///
    /// # Errors
    /// [`ClientError::TooMuch`] where the guest sends more than the limit.
    pub fn next(&mut self, message: Kind) -> Result<Option<Vec<u8>>> {
        let Some(data) = tunnel_output(message)? else {
            return Ok(None);
        };
        let room = self.room.checked_sub(data.len() as u64);
        self.room = room.ok_or_else(|| {
            ClientError::TooMuch(format!("{} bytes of a file", self.limit.bytes()))
        })?;
        Ok(Some(data))
    }
}

/// The time that `len` bytes of a file may take.
pub fn file_time(len: usize) -> Duration {
    Duration::from_micros((len as u64).saturating_mul(1_000_000) / MIN_FILE_RATE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streams_message_has_a_deadline_once_it_has_begun() {
        let remaining = Timing::Stream.of_message().remaining().unwrap();
        assert!(remaining <= Duration::from_secs(120));
    }

    #[test]
    fn input_ahead_of_a_command_is_bounded_whatever_the_agent_says() {
        let mut credit = InputCredit::default();
        credit.spend(credit.available());
        assert_eq!(credit.available(), 0);
        credit.taken(10);
        assert_eq!(credit.available(), 10);
        credit.spend(4);
        credit.taken(u64::MAX);
        assert!(credit.available() > 0);
        credit.taken(0);
        assert_eq!(credit.available(), 0);
    }
}
