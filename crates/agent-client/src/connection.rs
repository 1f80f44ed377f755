//! A connection to an agent, before its one request.

use std::path::Path;

use agent_proto::deadline::{ByteLimit, Deadline};
use agent_proto::error::ClientError;
use agent_proto::exchange::{
    self, CONNECT_ANSWER_MAX, ConnectAnswer, IncomingFile, Timing, connect_line,
};
use agent_proto::frame;
use agent_proto::messages::{
    Acknowledge, Attach, CommandInfo, Connect, Empty, Exec, FromAgent, Get, Hello, Info, Put,
    SignalCommand, Unpack, from_agent, request::Operation,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::socket::connect;
use crate::wire::{Wire, within};
use crate::{AgentSocket, Download, Result, Running, Tunnel, Upload};

/// A connection to an agent, before its one request.
pub struct Connection {
    pub(crate) wire: Wire,
    hello: Hello,
}

impl Connection {
    /// Connects to the agent behind the vsock socket at `path`, which takes `CONNECT port` and
    /// answers `OK …`. The deadline is for all that follows, until [`Connection::set_deadline`].
    ///
    /// # Errors
    /// [`ClientError::NoAgent`] where no agent has greeted until the deadline.
    pub async fn open(path: &Path, deadline: Deadline) -> Result<Self> {
        let opened = Self::try_open(path, deadline).await;
        opened.map_err(|error| match error {
            ClientError::Late => ClientError::NoAgent,
            other => other,
        })
    }

    async fn try_open(path: &Path, deadline: Deadline) -> Result<Self> {
        let mut socket = AgentSocket::new(connect(path, deadline).await?);
        let opened = async {
            let line = connect_line();
            let sent = socket.write_all(line.as_bytes()).await;
            sent.map_err(|_| ClientError::NoAgent)?;
            let mut answer = ConnectAnswer::default();
            let mut chunk = [0; CONNECT_ANSWER_MAX];
            loop {
                let len = match socket.read(&mut chunk).await {
                    Ok(len) if len > 0 => len,
                    _ => return Err(ClientError::NoAgent),
                };
                if let Some(rest) = answer.push(&chunk[..len])? {
                    return Ok(rest);
                }
            }
        };
        let received = within(Some(deadline), opened).await?;
        Self::start(socket, &received, deadline).await
    }

    /// Takes a stream that already leads to an agent.
    ///
    /// # Errors
    /// [`ClientError::NoAgent`] where the stream ends, and [`ClientError::Late`] where the deadline
    /// passes, before the agent's greeting.
    pub async fn greet(socket: AgentSocket, deadline: Deadline) -> Result<Self> {
        Self::start(socket, &[], deadline).await
    }

    /// Takes a stream from which the beginning of the greeting was read.
    async fn start(socket: AgentSocket, received: &[u8], deadline: Deadline) -> Result<Self> {
        let mut wire = Wire::new(socket, received, deadline);
        let hello = exchange::greeting(wire.receive().await)?;
        Ok(Self { wire, hello })
    }

    /// The stream, and the greeting that was read from it, encoded: for a process that passes both
    /// on to another one, which then calls [`Connection::greet`].
    ///
    /// # Errors
    /// Where the greeting cannot be encoded.
    pub fn into_socket(self) -> Result<(AgentSocket, Vec<u8>)> {
        let hello = FromAgent {
            kind: Some(from_agent::Kind::Hello(self.hello)),
        };
        let mut greeting = Vec::new();
        frame::encode(&hello, &mut greeting)?;
        Ok((self.wire.socket, greeting))
    }

    /// Keeps `guard` until the connection is dropped, and what becomes of it.
    #[must_use]
    pub fn keeping(mut self, guard: impl Send + 'static) -> Self {
        self.wire.socket = self.wire.socket.keeping(guard);
        self
    }

    /// What the agent said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Sets another deadline, for an operation that may take longer than its greeting.
    pub fn set_deadline(&mut self, deadline: Deadline) {
        self.wire.set_timing(Timing::Exchange(deadline));
    }

    /// Sends the request, and waits for the first answer.
    pub(crate) async fn request(&mut self, operation: Operation) -> Result<from_agent::Kind> {
        let request = exchange::request(operation, &self.hello)?;
        self.wire.exchange(request).await
    }

    /// Asks about the guest.
    pub async fn info(mut self) -> Result<Info> {
        exchange::info(self.request(Operation::Info(Empty {})).await?)
    }

    /// The commands that the agent knows.
    pub async fn commands(mut self) -> Result<Vec<CommandInfo>> {
        let request = Operation::ListCommands(Empty {});
        exchange::commands(self.request(request).await?)
    }

    /// Sends a signal to a command, whoever is attached to it.
    pub async fn signal_command(mut self, id: u64, signal: i32) -> Result<()> {
        let request = Operation::SignalCommand(SignalCommand { id, signal });
        exchange::done(self.request(request).await?)
    }

    /// Reads a file of the guest, of at most `limit` bytes.
    pub async fn get(mut self, path: &str, limit: ByteLimit) -> Result<Download> {
        let path = path.to_owned();
        let answer = self.request(Operation::Get(Get { path })).await?;
        let file = IncomingFile::begin(answer, limit)?;
        Ok(Download::new(self.wire, file))
    }

    /// Begins to write a file in the guest. The file appears when the upload is finished.
    ///
    /// # Errors
    /// Where the request is too long. A refusal of the agent is the error of a later step.
    pub fn put(mut self, put: Put) -> Result<Upload> {
        let request = exchange::request(Operation::Put(put), &self.hello)?;
        self.wire.queue(request)?;
        Ok(Upload::new(self.wire))
    }

    /// Begins to unpack a tar archive into a directory of the guest. Files appear one by one, each as
    /// a whole.
    ///
    /// # Errors
    /// Where the request is too long. A refusal of the agent is the error of a later step.
    pub fn unpack(mut self, unpack: Unpack) -> Result<Upload> {
        let request = exchange::request(Operation::Unpack(unpack), &self.hello)?;
        self.wire.queue(request)?;
        Ok(Upload::new(self.wire))
    }

    /// Connects to a TCP port on the guest's loopback. The deadline is for the connecting only.
    pub async fn connect(mut self, port: u16) -> Result<Tunnel> {
        let request = Operation::Connect(Connect { port: port.into() });
        exchange::connected(self.request(request).await?)?;
        Ok(Tunnel::new(self.wire))
    }

    /// Runs a command, until the deadline or as [`Running::streaming`] has it.
    pub async fn exec(mut self, exec: Exec) -> Result<Running> {
        let started = exchange::started(self.request(Operation::Exec(exec)).await?)?;
        Ok(Running::new(self.wire, started, Acknowledge::default()))
    }

    /// Goes on with a command, from where `arrived` says.
    pub async fn attach(self, id: u64, arrived: Acknowledge) -> Result<Running> {
        self.attach_as(id, arrived, false).await
    }

    /// Reads the output of a command beside the connection that is attached to it. Output is dropped
    /// for a reader that is too slow.
    pub async fn observe(self, id: u64, arrived: Acknowledge) -> Result<Running> {
        self.attach_as(id, arrived, true).await
    }

    async fn attach_as(mut self, id: u64, arrived: Acknowledge, observe: bool) -> Result<Running> {
        let request = Operation::Attach(Attach {
            id,
            stdout_cursor: arrived.stdout_cursor,
            stderr_cursor: arrived.stderr_cursor,
            observe,
        });
        let started = exchange::started(self.request(request).await?)?;
        Ok(Running::new(self.wire, started, arrived))
    }
}
