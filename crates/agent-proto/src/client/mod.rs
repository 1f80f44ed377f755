//! The host's side with blocking I/O, over a VM's vsock socket.
//!
//! A connection has a deadline from the first system call on. An exchange that an agent prolongs
//! byte by byte ends with [`ClientError::Late`], as does one that it does not answer.

mod outgoing;
mod running;
mod socket;
#[cfg(test)]
mod tests;
mod tunnel;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::running::{Input, Running};
pub use self::tunnel::{TunnelIn, TunnelOut};
pub use crate::deadline::{ByteLimit, Deadline};
pub use crate::error::ClientError;
pub use crate::exec::{Collected, Event};

use self::outgoing::Outgoing;
use self::socket::{connect_by, read_by, wait_by, write_by};
use crate::CHUNK;
use crate::exchange::{
    self, CONNECT_ANSWER_MAX, ConnectAnswer, IncomingFile, Timing, connect_line, file_time,
};
use crate::frame;
use crate::incoming::Incoming;
use crate::messages::{
    Acknowledge, Attach, CommandInfo, Connect, Empty, Exec, FileInfo, FromAgent, Get, Hello,
    Identity, Info, Put, Shutdown, SignalCommand, Started, from_agent, from_host,
    request::Operation,
};

/// The most notices that are kept of an agent, since a guest chooses how many it sends.
const MAX_NOTICES: usize = 32;
type Result<T> = std::result::Result<T, ClientError>;

/// A connection to an agent, before its one request.
pub struct Connection {
    stream: UnixStream,
    outgoing: Arc<Outgoing>,
    incoming: Incoming,
    hello: Hello,
}

impl Connection {
    /// Connects to the agent behind the vsock socket at `path`, which accepts `CONNECT port` and
    /// answers `OK …`. The deadline applies to everything that follows, until
    /// [`Connection::set_deadline`].
    ///
    /// # Errors
    /// [`ClientError::NoAgent`] if no agent has greeted before the deadline.
    pub fn open(path: &Path, deadline: Deadline) -> Result<Self> {
        Self::try_open(path, deadline).map_err(|error| match error {
            ClientError::Late => ClientError::NoAgent,
            other => other,
        })
    }

    fn try_open(path: &Path, deadline: Deadline) -> Result<Self> {
        let stream = connect_by(path, deadline)?;
        write_by(&stream, connect_line().as_bytes(), deadline).map_err(|_| ClientError::NoAgent)?;
        let begun = read_connect_answer(&stream, deadline)?;
        Self::start(stream, &begun, deadline)
    }

    /// Makes a connection from a stream that already leads to an agent.
    pub fn greet(stream: UnixStream, deadline: Deadline) -> Result<Self> {
        Self::start(stream, &[], deadline)
    }

    /// Makes a connection from a stream of which the beginning of the greeting was read.
    fn start(stream: UnixStream, begun: &[u8], deadline: Deadline) -> Result<Self> {
        let outgoing = Outgoing::new(&stream, Timing::Exchange(deadline));
        let mut connection = Self {
            stream,
            outgoing: Arc::new(outgoing.map_err(ClientError::Lost)?),
            incoming: Incoming::default(),
            hello: Hello::default(),
        };
        connection.incoming.push(begun);
        let received = connection.receive();
        connection.hello = exchange::greeting(received)?;
        Ok(connection)
    }

    /// Returns the stream and the encoded greeting that was read from it, for a process that passes
    /// both to another one, which then calls [`Connection::greet`].
    pub fn into_stream(self) -> Result<(UnixStream, Vec<u8>)> {
        let hello = FromAgent {
            kind: Some(from_agent::Kind::Hello(self.hello)),
        };
        let mut greeting = Vec::new();
        frame::encode(&hello, &mut greeting)?;
        self.stream
            .set_read_timeout(None)
            .and_then(|()| self.stream.set_write_timeout(None))
            .map_err(ClientError::Lost)?;
        Ok((self.stream, greeting))
    }

    /// The agent's greeting.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Sets another deadline, for an operation that may take longer than its greeting.
    pub fn set_deadline(&mut self, deadline: Deadline) {
        self.outgoing.set_timing(Timing::Exchange(deadline));
    }

    /// Extends the deadline.
    fn extend_deadline(&mut self, by: Duration) {
        let timing = self.outgoing.timing();
        self.outgoing.set_timing(timing.extended(by));
    }

    fn send(&mut self, kind: from_host::Kind) -> Result<()> {
        self.outgoing.send(kind)
    }

    fn request(&mut self, operation: Operation) -> Result<()> {
        let request = exchange::request(operation, &self.hello)?;
        self.send(request)
    }

    /// Receives the next message of a known kind.
    fn receive(&mut self) -> Result<from_agent::Kind> {
        loop {
            if let Some(kind) = self.receive_or_credit()? {
                return Ok(kind);
            }
        }
    }

    /// Receives the next message, or `None` after one that only granted credit for more input: the
    /// caller may have something to send before it waits again.
    fn receive_or_credit(&mut self) -> Result<Option<from_agent::Kind>> {
        let mut chunk = [0; 16 << 10];
        // The deadline of a message in a stream that has arrived in part.
        let mut begun = None;
        loop {
            match self.incoming.next()? {
                Some(from_agent::Kind::InputTaken(taken)) => {
                    self.outgoing.input_taken(taken);
                    return Ok(None);
                }
                Some(kind) => return Ok(Some(kind)),
                None => {}
            }
            let timing = self.outgoing.timing();
            let deadline = match timing {
                Timing::Exchange(deadline) => Some(deadline),
                Timing::Stream if self.incoming.is_partial() => {
                    Some(*begun.get_or_insert_with(|| timing.of_message()))
                }
                Timing::Stream => None,
            };
            let len = read_by(&self.stream, &mut chunk, deadline)?;
            if len == 0 {
                return Err(ClientError::Lost(io::ErrorKind::UnexpectedEof.into()));
            }
            self.incoming.push(&chunk[..len]);
        }
    }

    /// Waits until bytes have arrived (true) or can be sent.
    fn may_receive_by(&self, deadline: Deadline) -> Result<bool> {
        match self.incoming.is_partial() {
            true => Ok(true),
            false => wait_by(&self.stream, deadline),
        }
    }

    fn expect_done(&mut self) -> Result<()> {
        exchange::done(self.receive()?)
    }

    fn expect_started(&mut self) -> Result<Started> {
        exchange::started(self.receive()?)
    }

    /// Requests facts about the guest.
    pub fn info(mut self) -> Result<Info> {
        self.request(Operation::Info(Empty {}))?;
        exchange::info(self.receive()?)
    }

    /// Makes the guest write dirty data to its disks.
    pub fn sync(mut self) -> Result<()> {
        self.request(Operation::Sync(Empty {}))?;
        self.expect_done()
    }

    /// Gives the guest an identity. Returns notices about the steps that failed.
    pub fn set_identity(mut self, identity: Identity) -> Result<Vec<String>> {
        self.request(Operation::SetIdentity(identity))?;
        let mut notices = Vec::new();
        loop {
            match self.receive()? {
                from_agent::Kind::Notice(text) if notices.len() < MAX_NOTICES => notices.push(text),
                from_agent::Kind::Notice(_) => {}
                from_agent::Kind::Done(_) => return Ok(notices),
                _ => return Err(ClientError::OutOfTurn),
            }
        }
    }

    /// Sends a signal to a command, independently of the attached host.
    pub fn signal_command(mut self, id: u64, signal: i32) -> Result<()> {
        self.request(Operation::SignalCommand(SignalCommand { id, signal }))?;
        self.expect_done()
    }

    /// Asks the guest to switch off, or to reboot.
    pub fn shutdown(mut self, reboot: bool) -> Result<()> {
        self.request(Operation::Shutdown(Shutdown { reboot }))?;
        self.expect_done()
    }

    /// The commands that the agent knows.
    pub fn commands(mut self) -> Result<Vec<CommandInfo>> {
        self.request(Operation::ListCommands(Empty {}))?;
        exchange::commands(self.receive()?)
    }

    /// Writes a file in the guest with the content of `source`. The deadline excludes the time that
    /// `source` takes, and is extended for the bytes that the guest has received.
    pub fn put(mut self, put: Put, source: &mut impl Read) -> Result<()> {
        self.request(Operation::Put(put))?;
        let mut chunk = vec![0; CHUNK];
        loop {
            let before = Instant::now();
            let len = source.read(&mut chunk).map_err(ClientError::Local)?;
            self.extend_deadline(before.elapsed());
            if len == 0 {
                break;
            }
            let data = from_host::Kind::Data(chunk[..len].to_vec());
            match self.send(data) {
                Ok(()) => self.extend_deadline(file_time(len)),
                Err(ClientError::Late) => return Err(ClientError::Late),
                // The agent has stopped receiving, and has sent the reason.
                Err(_) => return self.expect_done(),
            }
        }
        // If this is not received, the agent's answer has arrived, as above.
        let _ = self.send(from_host::Kind::DataEnd(Empty {}));
        self.expect_done()
    }

    /// Reads a file of the guest into `sink`, and returns facts about the file. The deadline
    /// excludes the time that `sink` takes, and is extended for the bytes that the guest has sent.
    ///
    /// # Errors
    /// [`ClientError::TooMuch`] if the guest sends more than `limit`.
    pub fn get(mut self, path: &str, sink: &mut impl Write, limit: ByteLimit) -> Result<FileInfo> {
        self.request(Operation::Get(Get {
            path: path.to_owned(),
        }))?;
        let mut file = IncomingFile::begin(self.receive()?, limit)?;
        while let Some(data) = file.next(self.receive()?)? {
            let before = Instant::now();
            sink.write_all(&data).map_err(ClientError::Local)?;
            self.extend_deadline(before.elapsed() + file_time(data.len()));
        }
        Ok(file.info())
    }

    /// Connects to a TCP port on the guest's loopback, and returns both directions, each for a
    /// separate thread. The deadline applies to connecting only.
    pub fn connect(mut self, port: u16) -> Result<(TunnelOut, TunnelIn)> {
        self.request(Operation::Connect(Connect { port: port.into() }))?;
        exchange::connected(self.receive()?)?;
        Ok(TunnelOut::split(self))
    }

    /// Runs a command, until the deadline or without one after [`Running::streaming`].
    pub fn exec(mut self, exec: Exec) -> Result<Running> {
        self.request(Operation::Exec(exec))?;
        let started = self.expect_started()?;
        Ok(Running::new(self, started, Acknowledge::default()))
    }

    /// Attaches to a command, whose output continues from `arrived`.
    pub fn attach(mut self, id: u64, arrived: Acknowledge) -> Result<Running> {
        let Acknowledge {
            stdout_cursor,
            stderr_cursor,
        } = arrived;
        self.request(Operation::Attach(Attach {
            id,
            stdout_cursor,
            stderr_cursor,
            observe: false,
        }))?;
        let started = self.expect_started()?;
        Ok(Running::new(self, started, arrived))
    }
}

/// Reads the answer to `CONNECT`, and gives what came after it.
fn read_connect_answer(stream: &UnixStream, deadline: Deadline) -> Result<Vec<u8>> {
    let mut answer = ConnectAnswer::default();
    let mut chunk = [0; CONNECT_ANSWER_MAX];
    loop {
        let len = match read_by(stream, &mut chunk, Some(deadline)) {
            Ok(len) if len > 0 => len,
            _ => return Err(ClientError::NoAgent),
        };
        if let Some(rest) = answer.push(&chunk[..len])? {
            return Ok(rest);
        }
    }
}
