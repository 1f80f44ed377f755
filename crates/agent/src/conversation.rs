//! The messages of a session in both directions, refusals, and the reasons for an early end of a
//! session.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use agent_proto::frame::{self, Decoder};
use agent_proto::messages::{Empty, ErrorCode, FromAgent, FromHost, from_agent, from_host};

/// The stack size of session threads, whose buffers are on the heap.
pub(crate) const STACK_BYTES: usize = 64 << 10;

/// A refused request, with the text of the answer.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// Makes a refusal for an operation `what` that failed with `error`.
    pub(crate) fn io(what: impl std::fmt::Display, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => ErrorCode::NotFound,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                ErrorCode::Denied
            }
            io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory => ErrorCode::Exhausted,
            _ => ErrorCode::Other,
        };
        Self::new(code, format!("{what}: {error}"))
    }
}

/// The reason why a session ended before its request was answered.
#[derive(Debug)]
pub(crate) enum End {
    /// The request was refused. The answer to the host contains the reason.
    Refused(Refusal),
    /// The connection is lost, or a message is invalid.
    Lost,
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Sends messages to the host. Threads may share it, since messages are sent whole.
#[derive(Clone)]
pub(crate) struct Outbox(Arc<Mutex<File>>);

impl Outbox {
    pub(crate) fn new(stream: File) -> Self {
        Self(Arc::new(Mutex::new(stream)))
    }

    pub(crate) fn send(&self, kind: from_agent::Kind) -> Result<(), End> {
        let mut bytes = Vec::new();
        frame::encode(&FromAgent { kind: Some(kind) }, &mut bytes).map_err(|_| End::Lost)?;
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&bytes).map_err(|_| End::Lost)
    }

    pub(crate) fn done(&self) -> Result<(), End> {
        self.send(from_agent::Kind::Done(Empty {}))
    }
}

/// Receives messages from the host.
pub(crate) struct Inbox {
    stream: File,
    decoder: Decoder,
    chunk: Vec<u8>,
}

impl Inbox {
    pub(crate) fn new(stream: File) -> Self {
        Self {
            stream,
            decoder: Decoder::default(),
            chunk: vec![0; 16 << 10],
        }
    }

    /// The stream, to wait for it together with others.
    pub(crate) fn stream(&self) -> &File {
        &self.stream
    }

    /// The next message; `None` for a kind that only a newer host knows.
    pub(crate) fn receive(&mut self) -> Result<Option<from_host::Kind>, End> {
        loop {
            if let Some(message) = self.decoder.next::<FromHost>().map_err(|_| End::Lost)? {
                return Ok(message.kind);
            }
            let len = self.stream.read(&mut self.chunk).map_err(|_| End::Lost)?;
            if len == 0 {
                return Err(End::Lost);
            }
            self.decoder.push(&self.chunk[..len]);
        }
    }
}
