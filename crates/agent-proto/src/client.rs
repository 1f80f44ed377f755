//! The host's side with blocking I/O, over a VM's vsock socket.

use std::io::{self, Read, Write};
use std::net::Shutdown as SocketEnd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prost::Message;

use crate::frame::{self, Decoder, FIRST_MAX_MESSAGE, FrameError, Framed};
use crate::messages::{
    Acknowledge, Attach, CommandInfo, Connect, Empty, Exec, Exited, FileInfo, FromAgent, FromHost,
    Get, Hello, Identity, Info, Put, Request, Shutdown, SignalCommand, Started, Stream,
    TerminalSize, from_agent, from_host, request::Operation,
};
use crate::{CHUNK, INPUT_WINDOW, OUTPUT_WINDOW, PORT};

/// Output is acknowledged at least this often (bytes), well before the agent's window is full.
const ACKNOWLEDGE_EVERY: u64 = OUTPUT_WINDOW as u64 / 4;
/// More than what surrounds a request in its message (bytes).
const MESSAGE_OVERHEAD: usize = 16;
/// Notices that are kept of an agent, and the characters of each: a guest chooses them.
const NOTICES_MAX: usize = 32;
const NOTICE_CHARS_MAX: usize = 400;
/// The longest answer to `CONNECT`.
const CONNECT_ANSWER_MAX: usize = 32;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VM's socket cannot be reached.
    #[error("cannot reach the VM's vsock socket {path}: {source}")]
    Connect {
        /// The socket.
        path: String,
        /// The host's answer.
        source: io::Error,
    },
    /// Nobody listens in the guest.
    #[error("no agent answers in the guest: it is still starting, or it is not in its image")]
    NoAgent,
    /// The connection was lost; the guest may have ended.
    #[error("the connection to the agent was lost: {0}")]
    Lost(#[source] io::Error),
    /// The agent said nothing until the time given to it was over.
    #[error("the guest does not answer: its agent said nothing in time")]
    Late,
    /// The agent said something that is not the protocol.
    #[error("the agent cannot be understood: {0}")]
    Garbled(#[from] FrameError),
    /// The agent said something out of turn.
    #[error("the agent answered with something else than asked for")]
    OutOfTurn,
    /// The request is longer than the agent takes.
    #[error(
        "the command's arguments and environment are too long: {len} bytes, and the guest's agent takes {max}"
    )]
    TooLong {
        /// How long it is.
        len: usize,
        /// How long it may be.
        max: usize,
    },
    /// The agent refused.
    #[error("{}", .0.message)]
    Refused(crate::messages::Error),
    /// A local file or stream failed.
    #[error("cannot read or write the data locally: {0}")]
    Local(#[source] io::Error),
}

type Result<T> = std::result::Result<T, ClientError>;

/// A connection to an agent, before its one request.
pub struct Connection {
    stream: UnixStream,
    out: Arc<Out>,
    decoder: Decoder,
    hello: Hello,
    deadline: Option<Instant>,
}

/// The way to the agent, shared by whoever sends: messages must not be mixed.
struct Out {
    stream: Mutex<UnixStream>,
    /// The same, for who ends it while somebody waits to send.
    end: UnixStream,
    credit: Mutex<Credit>,
    /// Notified when `credit` changed.
    credit_changed: Condvar,
}

/// How much input may be sent.
#[derive(Default)]
struct Credit {
    sent: u64,
    taken: u64,
    lost: bool,
}

impl Out {
    fn disconnect(&self) {
        // Not connected any more is what was asked for.
        let _ = self.end.shutdown(SocketEnd::Both);
    }

    fn send(&self, kind: from_host::Kind) -> Result<()> {
        let mut bytes = Vec::new();
        frame::encode(&FromHost { kind: Some(kind) }, &mut bytes)?;
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&bytes).map_err(ClientError::Lost)
    }

    fn credit(&self) -> MutexGuard<'_, Credit> {
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_credit(&self, change: impl FnOnce(&mut Credit)) {
        change(&mut self.credit());
        self.credit_changed.notify_all();
    }

    /// Waits until `len` more bytes of input may be sent, and counts them as sent.
    fn take_credit(&self, len: u64) -> Result<()> {
        let mut credit = self.credit();
        while !credit.lost && credit.sent + len > credit.taken + INPUT_WINDOW as u64 {
            credit = self
                .credit_changed
                .wait(credit)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if credit.lost {
            return Err(ClientError::Lost(io::ErrorKind::NotConnected.into()));
        }
        credit.sent += len;
        Ok(())
    }
}

/// A stream to `port` of the guest behind the vsock socket at `path`. Reads from it end after
/// `timeout`, until the caller says otherwise.
///
/// # Errors
/// [`ClientError::NoAgent`] where nobody listens there.
pub fn connect(path: &Path, port: u32, timeout: Duration) -> Result<UnixStream> {
    let mut stream = ask(path, port, timeout)?;
    // Byte by byte: what follows the answer is the caller's.
    read_connect_answer(&mut stream, 1)?;
    Ok(stream)
}

/// Asks the vsock socket at `path` for `port` of the guest; the answer is still to be read.
fn ask(path: &Path, port: u32, timeout: Duration) -> Result<UnixStream> {
    let unreachable = |source| ClientError::Connect {
        path: path.display().to_string(),
        source,
    };
    let mut stream = UnixStream::connect(path).map_err(unreachable)?;
    stream
        .set_read_timeout(Some(timeout))
        .map_err(unreachable)?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .map_err(|_| ClientError::NoAgent)?;
    Ok(stream)
}

/// What is left until `deadline`.
fn left_until(deadline: Instant) -> Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(ClientError::Late),
        false => Ok(left),
    }
}

impl Connection {
    /// Connects to the agent behind the vsock socket at `path`, which takes `CONNECT port` and
    /// answers `OK …`. `timeout` bounds the wait for the agent's greeting, and nothing after it.
    pub fn open(path: &Path, timeout: Duration) -> Result<Self> {
        let mut stream = ask(path, PORT, timeout)?;
        let greeting = read_connect_answer(&mut stream, CONNECT_ANSWER_MAX)?;
        Self::go_on(stream, &greeting)
    }

    /// Takes a stream that already leads to an agent.
    pub fn greet(stream: UnixStream) -> Result<Self> {
        Self::go_on(stream, &[])
    }

    /// Takes a stream from which the beginning of the greeting was read.
    fn go_on(stream: UnixStream, begun: &[u8]) -> Result<Self> {
        let out = Out {
            stream: Mutex::new(stream.try_clone().map_err(ClientError::Lost)?),
            end: stream.try_clone().map_err(ClientError::Lost)?,
            credit: Mutex::default(),
            credit_changed: Condvar::new(),
        };
        let mut connection = Self {
            stream,
            out: Arc::new(out),
            decoder: Decoder::default(),
            hello: Hello::default(),
            deadline: None,
        };
        connection.decoder.push(begun);
        match connection.receive() {
            Ok(from_agent::Kind::Hello(hello)) => connection.hello = hello,
            Ok(_) => return Err(ClientError::OutOfTurn),
            Err(ClientError::Lost(_)) => return Err(ClientError::NoAgent),
            Err(error) => return Err(error),
        }
        connection
            .stream
            .set_read_timeout(None)
            .map_err(ClientError::Lost)?;
        Ok(connection)
    }

    /// The stream, and the greeting that was read from it, encoded: for who passes both on to
    /// another process, which then calls [`Connection::greet`].
    pub fn into_stream(self) -> Result<(UnixStream, Vec<u8>)> {
        let hello = FromAgent {
            kind: Some(from_agent::Kind::Hello(self.hello)),
        };
        let mut greeting = Vec::new();
        frame::encode(&hello, &mut greeting)?;
        Ok((self.stream, greeting))
    }

    /// What the agent said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// From now on, waiting for the agent ends at `deadline` with [`ClientError::Late`]: for who
    /// must not wait for ever for a guest that hangs, or means harm.
    pub fn give_up_at(&mut self, deadline: Instant) -> Result<()> {
        self.deadline = Some(deadline);
        // What is sent first fills the guest's buffers, and would then wait, too.
        self.stream
            .set_write_timeout(Some(left_until(deadline)?))
            .map_err(ClientError::Lost)
    }

    fn send(&mut self, kind: from_host::Kind) -> Result<()> {
        self.out.send(kind)
    }

    fn request(&mut self, operation: Operation) -> Result<()> {
        let request = Request {
            operation: Some(operation),
        };
        let max = self
            .hello
            .max_message
            .map_or(FIRST_MAX_MESSAGE, |max| max as usize);
        // Beside the request, a frame holds its tag and its length.
        let len = request.encoded_len() + MESSAGE_OVERHEAD;
        if len > max.min(FromHost::MAX) {
            return Err(ClientError::TooLong { len, max });
        }
        self.send(from_host::Kind::Request(request))
    }

    /// The next message that this side knows.
    fn receive(&mut self) -> Result<from_agent::Kind> {
        let mut chunk = [0; 16 << 10];
        loop {
            while let Some(message) = self.decoder.next::<FromAgent>()? {
                match message.kind {
                    Some(from_agent::Kind::Error(error)) => {
                        return Err(ClientError::Refused(error));
                    }
                    Some(from_agent::Kind::InputTaken(taken)) => {
                        self.out.change_credit(|credit| credit.taken = taken);
                    }
                    Some(kind) => return Ok(kind),
                    // From a newer agent: not for us.
                    None => {}
                }
            }
            let len = self.read(&mut chunk)?;
            if len == 0 {
                return Err(ClientError::Lost(io::ErrorKind::UnexpectedEof.into()));
            }
            self.decoder.push(&chunk[..len]);
        }
    }

    fn read(&mut self, chunk: &mut [u8]) -> Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = left_until(deadline)?;
            self.stream
                .set_read_timeout(Some(left))
                .map_err(ClientError::Lost)?;
        }
        self.stream.read(chunk).map_err(|error| {
            // What a read says when its time is over.
            match self.deadline.is_some() && error.kind() == io::ErrorKind::WouldBlock {
                true => ClientError::Late,
                false => ClientError::Lost(error),
            }
        })
    }

    fn expect_done(&mut self) -> Result<()> {
        match self.receive()? {
            from_agent::Kind::Done(_) => Ok(()),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// Asks about the guest.
    pub fn info(mut self) -> Result<Info> {
        self.request(Operation::Info(Empty {}))?;
        match self.receive()? {
            from_agent::Kind::Info(info) => Ok(info),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// Lets the guest write dirty data to its disks.
    pub fn sync(mut self) -> Result<()> {
        self.request(Operation::Sync(Empty {}))?;
        self.expect_done()
    }

    /// Gives the guest an identity. Returns what the guest could not do of it, in words for people.
    pub fn set_identity(mut self, identity: Identity) -> Result<Vec<String>> {
        self.request(Operation::SetIdentity(identity))?;
        let mut notices = Vec::new();
        loop {
            match self.receive()? {
                from_agent::Kind::Notice(text) if notices.len() < NOTICES_MAX => {
                    notices.push(printable(&text));
                }
                from_agent::Kind::Notice(_) => {}
                from_agent::Kind::Done(_) => return Ok(notices),
                _ => return Err(ClientError::OutOfTurn),
            }
        }
    }

    /// Sends a signal to a command, whoever is attached to it.
    pub fn signal_command(mut self, id: u64, signal: i32) -> Result<()> {
        self.request(Operation::SignalCommand(SignalCommand { id, signal }))?;
        self.expect_done()
    }

    /// Asks the guest to end, or to start anew.
    pub fn shutdown(mut self, reboot: bool) -> Result<()> {
        self.request(Operation::Shutdown(Shutdown { reboot }))?;
        self.expect_done()
    }

    /// The commands that the agent knows.
    pub fn commands(mut self) -> Result<Vec<CommandInfo>> {
        self.request(Operation::ListCommands(Empty {}))?;
        match self.receive()? {
            from_agent::Kind::Commands(list) => Ok(list.commands),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// Writes a file in the guest with what `source` gives.
    pub fn put(mut self, put: Put, source: &mut impl Read) -> Result<()> {
        self.request(Operation::Put(put))?;
        let mut chunk = vec![0; CHUNK];
        loop {
            let len = source.read(&mut chunk).map_err(ClientError::Local)?;
            if len == 0 {
                break;
            }
            if self
                .send(from_host::Kind::Data(chunk[..len].to_vec()))
                .is_err()
            {
                // The agent gave up; it has said why.
                return self.expect_done();
            }
        }
        // As above: where this is not taken, the answer is there.
        let _ = self.send(from_host::Kind::DataEnd(Empty {}));
        self.expect_done()
    }

    /// Reads a file of the guest into `sink`, and returns what it is.
    pub fn get(mut self, path: &str, sink: &mut impl Write) -> Result<FileInfo> {
        self.request(Operation::Get(Get {
            path: path.to_owned(),
        }))?;
        let from_agent::Kind::File(info) = self.receive()? else {
            return Err(ClientError::OutOfTurn);
        };
        loop {
            match self.receive()? {
                from_agent::Kind::Data(data) => {
                    sink.write_all(&data).map_err(ClientError::Local)?
                }
                from_agent::Kind::Done(_) => return Ok(info),
                _ => return Err(ClientError::OutOfTurn),
            }
        }
    }

    /// Connects to a TCP port on the guest's loopback: both ways of the connection, each for a thread
    /// of its own.
    pub fn connect(mut self, port: u16) -> Result<(TunnelOut, TunnelIn)> {
        self.request(Operation::Connect(Connect { port: port.into() }))?;
        match self.receive()? {
            from_agent::Kind::Connected(_) => {}
            _ => return Err(ClientError::OutOfTurn),
        }
        // The limit was for the connecting.
        self.deadline = None;
        self.stream
            .set_read_timeout(None)
            .and_then(|()| self.stream.set_write_timeout(None))
            .map_err(ClientError::Lost)?;
        let into = TunnelIn {
            out: Arc::clone(&self.out),
        };
        Ok((TunnelOut { connection: self }, into))
    }

    /// Runs a command.
    pub fn exec(mut self, exec: Exec) -> Result<Running> {
        self.request(Operation::Exec(exec))?;
        let from_agent::Kind::Started(started) = self.receive()? else {
            return Err(ClientError::OutOfTurn);
        };
        Ok(Running {
            connection: self,
            started,
            arrived: Acknowledge::default(),
            acknowledged: 0,
        })
    }

    /// Goes on with a command, from where `arrived` says.
    pub fn attach(mut self, id: u64, arrived: Acknowledge) -> Result<Running> {
        let Acknowledge {
            stdout_cursor,
            stderr_cursor,
        } = arrived;
        self.request(Operation::Attach(Attach {
            id,
            stdout_cursor,
            stderr_cursor,
        }))?;
        let from_agent::Kind::Started(started) = self.receive()? else {
            return Err(ClientError::OutOfTurn);
        };
        Ok(Running {
            connection: self,
            started,
            arrived,
            acknowledged: 0,
        })
    }
}

/// A guest's words, of bounded length and without what a terminal would act on.
fn printable(text: &str) -> String {
    let plain = |char: char| if char.is_control() { '\u{FFFD}' } else { char };
    text.chars().take(NOTICE_CHARS_MAX).map(plain).collect()
}

/// Reads the answer to `CONNECT`, up to `at_once` bytes a time, and gives what came after it.
fn read_connect_answer(stream: &mut UnixStream, at_once: usize) -> Result<Vec<u8>> {
    let mut read = Vec::new();
    let mut chunk = [0; CONNECT_ANSWER_MAX];
    loop {
        let len = match stream.read(&mut chunk[..at_once]) {
            Ok(len) if len > 0 => len,
            _ => return Err(ClientError::NoAgent),
        };
        read.extend_from_slice(&chunk[..len]);
        match read.iter().position(|&byte| byte == b'\n') {
            Some(end) if read.starts_with(b"OK ") => return Ok(read.split_off(end + 1)),
            None if read.len() < CONNECT_ANSWER_MAX => {}
            _ => return Err(ClientError::NoAgent),
        }
    }
}

/// What happens to a command.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It printed something.
    Output(Stream, Vec<u8>),
    /// So many bytes of a detached command's output are gone for good.
    Lost(Stream, u64),
    /// It ended.
    Exited(Exited),
}

/// A command that runs in the guest.
pub struct Running {
    connection: Connection,
    started: Started,
    arrived: Acknowledge,
    acknowledged: u64,
}

impl Running {
    /// What the agent calls it.
    pub fn started(&self) -> Started {
        self.started
    }

    /// From now on, waiting has no limit: undoes [`Connection::give_up_at`].
    pub fn wait_for_ever(&mut self) -> Result<()> {
        self.connection.deadline = None;
        self.connection
            .stream
            .set_read_timeout(None)
            .map_err(ClientError::Lost)
    }

    /// How much of its output has arrived: with it and the command's id, a later connection can go
    /// on where this one was lost.
    pub fn arrived(&self) -> Acknowledge {
        self.arrived
    }

    /// The way in: input, signals, the terminal's size. For another thread.
    pub fn input(&self) -> Input {
        Input {
            out: Arc::clone(&self.connection.out),
        }
    }

    /// Waits for the next event. What was handed out before counts as arrived.
    pub fn next_event(&mut self) -> Result<Event> {
        let total = self.arrived.stdout_cursor + self.arrived.stderr_cursor;
        if total >= self.acknowledged + ACKNOWLEDGE_EVERY {
            self.connection
                .send(from_host::Kind::Acknowledge(self.arrived))?;
            self.acknowledged = total;
        }
        match self.connection.receive()? {
            from_agent::Kind::Exited(exited) => {
                // So that the agent can forget the command; it may be gone already.
                let _ = self
                    .connection
                    .send(from_host::Kind::Acknowledge(self.arrived));
                Ok(Event::Exited(exited))
            }
            from_agent::Kind::Output(output) => {
                let stream = output.stream();
                let cursor = match stream {
                    Stream::Stdout => &mut self.arrived.stdout_cursor,
                    Stream::Stderr => &mut self.arrived.stderr_cursor,
                };
                let gap = output.cursor.saturating_sub(*cursor);
                *cursor = output.cursor + output.data.len() as u64;
                if gap > 0 && output.data.is_empty() {
                    return Ok(Event::Lost(stream, gap));
                }
                Ok(Event::Output(stream, output.data))
            }
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// Waits for the end and gathers all output. For small ones: it is kept in memory.
    pub fn collect(mut self) -> Result<(Exited, Vec<u8>, Vec<u8>)> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next_event()? {
                Event::Output(Stream::Stdout, data) => stdout.extend_from_slice(&data),
                Event::Output(Stream::Stderr, data) => stderr.extend_from_slice(&data),
                Event::Lost(..) => {}
                Event::Exited(exited) => return Ok((exited, stdout, stderr)),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Whoever waits to send input would wait for ever.
        self.connection
            .out
            .change_credit(|credit| credit.lost = true);
    }
}

/// What comes out of a connection in the guest.
pub struct TunnelOut {
    connection: Connection,
}

impl TunnelOut {
    /// The next bytes; none at their end. The other way goes on then.
    pub fn read(&mut self) -> Result<Option<Vec<u8>>> {
        match self.connection.receive()? {
            from_agent::Kind::Data(data) => Ok(Some(data)),
            from_agent::Kind::Done(_) => Ok(None),
            _ => Err(ClientError::OutOfTurn),
        }
    }
}

/// The way into a connection in the guest.
#[derive(Clone)]
pub struct TunnelIn {
    out: Arc<Out>,
}

impl TunnelIn {
    /// Sends bytes; waits while nobody takes them.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        bytes
            .chunks(CHUNK)
            .try_for_each(|chunk| self.out.send(from_host::Kind::Data(chunk.to_vec())))
    }

    /// The end of what is sent.
    pub fn end(&self) -> Result<()> {
        self.out.send(from_host::Kind::DataEnd(Empty {}))
    }

    /// Drops the connection, from any thread; whoever reads or writes gets an error.
    pub fn disconnect(&self) {
        self.out.disconnect();
    }
}

/// The way into a running command. Input is taken only while somebody waits for the command's
/// events.
#[derive(Clone)]
pub struct Input {
    out: Arc<Out>,
}

impl Input {
    /// Input for the command; waits while it takes none.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        bytes.chunks(CHUNK).try_for_each(|chunk| {
            self.out.take_credit(chunk.len() as u64)?;
            self.out.send(from_host::Kind::Stdin(chunk.to_vec()))
        })
    }

    /// The end of its input.
    pub fn end(&self) -> Result<()> {
        self.out.send(from_host::Kind::StdinEnd(Empty {}))
    }

    /// A signal for its process group.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.out.send(from_host::Kind::Signal(signal))
    }

    /// The terminal's new size.
    pub fn resize(&self, size: TerminalSize) -> Result<()> {
        self.out.send(from_host::Kind::Resize(size))
    }

    /// Drops the connection, from any thread; [`Running::next_event`] ends with an error.
    pub fn disconnect(&self) {
        self.out.disconnect();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn hello() -> Vec<u8> {
        let hello = FromAgent {
            kind: Some(from_agent::Kind::Hello(Hello {
                agent_version: "7".to_owned(),
                ..Hello::default()
            })),
        };
        let mut bytes = Vec::new();
        frame::encode(&hello, &mut bytes).unwrap();
        bytes
    }

    /// What a VM answers to who connects, piece by piece.
    fn opened(name: &str, pieces: Vec<Vec<u8>>) -> Result<Connection> {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let vm = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).unwrap();
            for piece in pieces {
                stream.write_all(&piece).unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let opened = Connection::open(&path, Duration::from_secs(10));
        vm.join().unwrap();
        std::fs::remove_file(&path).unwrap();
        opened
    }

    #[test]
    fn a_greeting_is_read_whole_however_it_comes() {
        let together = [b"OK 7\n".to_vec(), hello()].concat();
        let apart = together.iter().map(|&byte| vec![byte]).collect();
        let cut = together.split_at(9);
        for (number, pieces) in [apart, vec![cut.0.to_vec(), cut.1.to_vec()], vec![together]]
            .into_iter()
            .enumerate()
        {
            let connection = opened(&format!("greeting-{number}"), pieces).unwrap();
            assert_eq!(connection.hello().agent_version, "7");
        }
        let endless = vec![vec![b'O'; 2 * CONNECT_ANSWER_MAX]];
        for (number, pieces) in [endless, vec![b"NO\n".to_vec()], Vec::new()]
            .into_iter()
            .enumerate()
        {
            let refused = opened(&format!("no-greeting-{number}"), pieces);
            assert!(matches!(refused, Err(ClientError::NoAgent)));
        }
    }

    /// A connection to an agent that greets with `hello`, and the agent's end.
    fn greeted(hello: Hello) -> (Connection, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        let kind = Some(from_agent::Kind::Hello(hello));
        frame::encode(&FromAgent { kind }, &mut bytes).unwrap();
        theirs.write_all(&bytes).unwrap();
        (Connection::greet(ours).unwrap(), theirs)
    }

    #[test]
    fn a_request_is_as_long_as_the_agent_takes_and_longer_ones_are_not_sent() {
        let exec = |len| Exec {
            command: vec!["x".repeat(len)],
            ..Exec::default()
        };
        let newer = Hello {
            max_message: Some(FromHost::MAX as u32),
            ..Hello::default()
        };
        for (hello, len) in [(Hello::default(), 1 << 20), (newer, 8 << 20)] {
            let (connection, mut agent) = greeted(hello);
            let Err(ClientError::TooLong { max, .. }) = connection.exec(exec(len)) else {
                panic!("a request of {len} bytes was sent");
            };
            assert_eq!(max, len);
            // The connection ended without a word.
            let mut sent = Vec::new();
            agent.read_to_end(&mut sent).unwrap();
            assert_eq!(sent, b"");
        }
    }

    #[test]
    fn notices_of_a_guest_are_bounded_and_harmless_to_a_terminal() {
        let (connection, mut agent) = greeted(Hello::default());
        let mut bytes = Vec::new();
        let notice = format!("\x1b]0;owned\x07{}", "x".repeat(5000));
        for _ in 0..1000 {
            let kind = Some(from_agent::Kind::Notice(notice.clone()));
            frame::encode(&FromAgent { kind }, &mut bytes).unwrap();
        }
        let kind = Some(from_agent::Kind::Done(Empty {}));
        frame::encode(&FromAgent { kind }, &mut bytes).unwrap();
        let guest = std::thread::spawn(move || agent.write_all(&bytes).map(|()| agent));
        let notices = connection.set_identity(Identity::default()).unwrap();
        assert_eq!(notices.len(), NOTICES_MAX);
        assert!(
            notices
                .iter()
                .all(|it| it.chars().count() == NOTICE_CHARS_MAX)
        );
        assert!(!notices.concat().contains(char::is_control));
        guest.join().unwrap().unwrap();
    }

    #[test]
    fn a_guest_that_falls_silent_is_given_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&hello()).unwrap();
        let mut connection = Connection::greet(ours).unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        connection.give_up_at(deadline).unwrap();
        assert!(matches!(connection.info(), Err(ClientError::Late)));
        assert!(Instant::now() >= deadline);
    }
}
