//! One connection: greeting, one request, its answers.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use agent_proto::frame::Framed;
use agent_proto::messages::{
    Error, ErrorCode, FromHost, Hello, Request, from_agent, from_host, request::Operation,
};

use crate::conversation::{End, Inbox, Outbox, Refusal, STACK_BYTES};
use crate::exec::Commands;
use crate::{connect, exec, files, heap, identity, info, power};

/// The tags of `Request.operation` that are served here.
const OPERATIONS: [u32; 20] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
];

/// The state that all sessions share.
pub(crate) struct Agent {
    pub(crate) commands: Arc<Commands>,
    last_activity: Mutex<Instant>,
}

impl Agent {
    pub(crate) fn new() -> Self {
        Self {
            commands: Arc::default(),
            last_activity: Mutex::new(Instant::now()),
        }
    }

    /// The time of the last request.
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
        // If no thread can be started, the host sees the connection end.
        crate::say(&format!("no thread for a connection: {error}"));
    }
}

fn serve(agent: &Arc<Agent>, stream: File) {
    let Ok(writer) = stream.try_clone() else {
        return;
    };
    let outbox = Outbox::new(writer);
    let inbox = Inbox::new(stream);
    if let Err(End::Refused(refusal)) = converse(agent, inbox, &outbox) {
        let error = Error {
            code: refusal.code.into(),
            message: refusal.message,
        };
        // A host that has disconnected cannot receive the error.
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
        Operation::Exec(request) => exec::start(&agent.commands, request, inbox, outbox),
        Operation::Attach(request) => exec::attach(&agent.commands, &request, inbox, outbox),
        Operation::Info(_) => outbox.send(from_agent::Kind::Info(info::gather(
            agent.commands.running(),
            agent.idle_since().elapsed(),
        ))),
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
        Operation::ListDirectory(request) => outbox.send(from_agent::Kind::Directory(
            files::directory::list(&request)?,
        )),
        Operation::StatFile(request) => {
            outbox.send(from_agent::Kind::Entry(files::directory::stat(&request)?))
        }
        Operation::MakeDirectory(request) => {
            files::directory::make(&request)?;
            outbox.done()
        }
        Operation::RemoveFile(request) => {
            files::remove::remove(&request)?;
            outbox.done()
        }
        Operation::RenameFile(request) => {
            files::directory::rename(&request)?;
            outbox.done()
        }
        Operation::GetRange(request) => files::get_range(&request, outbox),
        Operation::Pack(request) => files::pack::pack(&request, outbox),
        Operation::Unpack(request) => files::unpack::unpack(&request, inbox, outbox),
        Operation::WatchFiles(request) => files::watch::watch(&request, inbox, outbox),
    }
}
