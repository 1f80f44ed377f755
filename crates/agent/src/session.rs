//! One connection: greeting, one request, its answers.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use agent_proto::frame::{self, Decoder, Framed};
use agent_proto::messages::{
    Empty, Error, ErrorCode, FromAgent, FromHost, Hello, Request, from_agent, from_host,
    request::Operation,
};

use crate::exec::Commands;
use crate::{connect, exec, files, heap, identity, info, power};

/// Stacks of session threads: buffers are on the heap.
pub(crate) const STACK_BYTES: usize = 64 << 10;
/// The tags of `Request.operation` that are served here.
const OPERATIONS: [u32; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];

/// What all sessions share.
pub(crate) struct Agent {
    pub(crate) commands: Commands,
    last_activity: Mutex<Instant>,
}

impl Agent {
    pub(crate) fn new() -> Self {
        Self {
            commands: Commands::default(),
            last_activity: Mutex::new(Instant::now()),
        }
    }

    /// Since when nobody has asked for anything.
    pub(crate) fn idle_since(&self) -> Instant {
        *self
            .last_activity
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note_activity(&self) {
        *self
            .last_activity
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// A request that could not be carried out, in the words of the answer.
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

    /// `what` was tried on the guest and failed with `error`.
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

/// Why a session ended before its request was answered.
#[derive(Debug)]
pub(crate) enum End {
    /// To be told to the host.
    Refused(Refusal),
    /// The connection is gone, or what comes over it makes no sense.
    Lost,
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// The way to the host. Whole messages, from any thread.
#[derive(Clone)]
pub(crate) struct Outbox(Arc<Mutex<File>>);

impl Outbox {
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

/// What comes from the host.
pub(crate) struct Inbox {
    stream: File,
    decoder: Decoder,
    chunk: Vec<u8>,
}

impl Inbox {
    /// The next message; `None` for one of a newer host.
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

/// Serves a connection on a thread of its own.
pub(crate) fn start(agent: &Arc<Agent>, stream: File) {
    let agent = Arc::clone(agent);
    let spawned = thread::Builder::new()
        .name("session".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            serve(&agent, stream);
            heap::trim();
        });
    if let Err(error) = spawned {
        // The host sees the connection end.
        crate::say(&format!("no thread for a connection: {error}"));
    }
}

fn serve(agent: &Arc<Agent>, stream: File) {
    let Ok(writer) = stream.try_clone() else {
        return;
    };
    let outbox = Outbox(Arc::new(Mutex::new(writer)));
    let inbox = Inbox {
        stream,
        decoder: Decoder::default(),
        chunk: vec![0; 16 << 10],
    };
    if let Err(End::Refused(refusal)) = converse(agent, inbox, &outbox) {
        let error = Error {
            code: refusal.code.into(),
            message: refusal.message,
        };
        // A host that went away cannot be told.
        let _ = outbox.send(from_agent::Kind::Error(error));
    }
}

fn converse(agent: &Arc<Agent>, mut inbox: Inbox, outbox: &Outbox) -> Result<(), End> {
    outbox.send(from_agent::Kind::Hello(Hello {
        protocol: agent_proto::PROTOCOL,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        operations: OPERATIONS.to_vec(),
        max_message: Some(FromHost::MAX as u32),
    }))?;
    let Some(from_host::Kind::Request(Request { operation })) = inbox.receive()? else {
        return Err(Refusal::new(ErrorCode::Invalid, "a connection starts with a request").into());
    };
    let operation = operation.ok_or_else(|| {
        let version = env!("CARGO_PKG_VERSION");
        let message = format!(
            "this guest's agent ({version}) is older than the host and does not know this operation"
        );
        Refusal::new(ErrorCode::Unsupported, message)
    })?;
    if !matches!(operation, Operation::Info(_) | Operation::ListCommands(_)) {
        agent.note_activity();
    }
    match operation {
        Operation::Exec(request) => exec::start(agent, request, inbox, outbox),
        Operation::Attach(request) => exec::attach(agent, &request, inbox, outbox),
        Operation::Info(_) => outbox.send(from_agent::Kind::Info(info::gather(agent))),
        Operation::Put(request) => files::put(&request, inbox, outbox),
        Operation::Get(request) => files::get(&request, outbox),
        Operation::Sync(_) => {
            rustix::fs::sync();
            outbox.done()
        }
        Operation::SetIdentity(request) => {
            for notice in identity::apply(&request)? {
                outbox.send(from_agent::Kind::Notice(notice))?;
            }
            outbox.done()
        }
        Operation::SignalCommand(request) => {
            agent.commands.signal(&request)?;
            outbox.done()
        }
        Operation::Shutdown(request) => power::shutdown(request.reboot, outbox),
        Operation::ListCommands(_) => {
            outbox.send(from_agent::Kind::Commands(agent.commands.list()))
        }
        Operation::Connect(request) => connect::serve(&request, inbox, outbox),
    }
}
