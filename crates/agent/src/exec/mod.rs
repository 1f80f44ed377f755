//! Starts commands, feeds them, reads their output, ends them, and finds them again after a lost
//! connection.
//!
//! A command ([`command::Command`]) exists independently of the session that may be attached to it.
//! Its output goes through a [`spool`], which keeps the bytes that the host has not acknowledged.
//! So a lost connection loses no output, and a slow host slows the command down instead of filling
//! the guest's memory.

mod command;
mod input;
mod spawn;
mod spool;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use agent_proto::messages::{
    Acknowledge, Attach, CommandInfo, ErrorCode, Exec, Output, SignalCommand, Started, Stream,
    from_agent, from_host,
};

use self::command::{Command, Piece};
use crate::conversation::{End, Inbox, Outbox, Refusal, STACK_BYTES};
use crate::image::Image;
use crate::users;

/// The PATH of commands whose environment has none.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The numbers of signals (signal(7)).
const SIGNALS: std::ops::RangeInclusive<i32> = 1..=64;
/// The most ended commands that are kept because no host has seen their end.
const ENDED_KEPT: usize = 64;

/// All commands, by id.
#[derive(Default)]
pub(crate) struct Commands(Mutex<Table>);

#[derive(Default)]
struct Table {
    last_id: u64,
    commands: BTreeMap<u64, Arc<Command>>,
}

impl Commands {
    /// The table, without the commands that are not kept any more.
    fn lock(&self) -> MutexGuard<'_, Table> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.commands.retain(|_, command| !command.is_over());
        table
    }

    /// The number of running commands.
    pub(crate) fn running(&self) -> u32 {
        let table = self.lock();
        table
            .commands
            .values()
            .filter(|command| command.exited().is_none())
            .count() as u32
    }

    pub(crate) fn list(&self) -> agent_proto::messages::Commands {
        let describe = |command: &Arc<Command>| CommandInfo {
            id: command.id,
            pid: command.pid,
            command: command.words.clone(),
            exited: command.exited(),
        };
        let table = self.lock();
        // What a host has seen is kept for those who attach again, and for nobody else.
        let unseen = table.commands.values().filter(|it| !it.is_seen());
        agent_proto::messages::Commands {
            commands: unseen.map(describe).collect(),
        }
    }

    fn find(&self, id: u64) -> Option<Arc<Command>> {
        self.lock().commands.get(&id).cloned()
    }

    fn start(&self, request: &Exec) -> Result<Arc<Command>, Refusal> {
        let id = {
            let mut table = self.lock();
            table.last_id += 1;
            table.last_id
        };
        let command = Command::start(id, request)?;
        let mut table = self.lock();
        table.commands.insert(id, Arc::clone(&command));
        let ended: Vec<u64> = table
            .commands
            .iter()
            .filter(|(_, command)| command.exited().is_some() && !command.is_attached())
            .map(|(id, _)| *id)
            .collect();
        for id in &ended[..ended.len().saturating_sub(ENDED_KEPT)] {
            table.commands.remove(id);
        }
        Ok(command)
    }

    /// Signals a running command, independently of the attached session.
    pub(crate) fn signal(&self, request: &SignalCommand) -> Result<(), Refusal> {
        let SignalCommand { id, signal } = *request;
        if !SIGNALS.contains(&signal) {
            let message = format!("{signal} is not a signal: they are numbered from 1 to 64");
            return Err(Refusal::new(ErrorCode::Invalid, message));
        }
        let signalled = self.find(id).is_some_and(|command| command.signal(signal));
        signalled.then_some(()).ok_or_else(|| {
            let message = format!("no command {id} runs in the guest");
            Refusal::new(ErrorCode::NotFound, message)
        })
    }

    fn forget(&self, id: u64) {
        self.lock().commands.remove(&id);
    }
}

/// Starts a command and attaches this session to it.
pub(crate) fn start(
    commands: &Commands,
    mut request: Exec,
    inbox: Inbox,
    outbox: &Outbox,
) -> Result<(), End> {
    Image::of_this_guest()?.fill(&mut request);
    if request.login_shell {
        request.command = vec![login_shell(&request.user)?];
    }
    let command = commands.start(&request)?;
    attend(commands, &command, Acknowledge::default(), inbox, outbox)
}

fn login_shell(user: &str) -> Result<String, Refusal> {
    users::find(user)?
        .shell()
        .ok_or_else(|| Refusal::new(ErrorCode::NotFound, "the guest has no shell"))
}

/// Attaches this session to an existing command.
pub(crate) fn attach(
    commands: &Commands,
    request: &Attach,
    inbox: Inbox,
    outbox: &Outbox,
) -> Result<(), End> {
    let command = commands.find(request.id).ok_or_else(|| {
        let message = format!(
            "no command {} in the guest, or its end was seen already",
            request.id
        );
        Refusal::new(ErrorCode::NotFound, message)
    })?;
    let arrived = Acknowledge {
        stdout_cursor: request.stdout_cursor,
        stderr_cursor: request.stderr_cursor,
    };
    if request.observe {
        return observe(commands, &command, arrived, inbox, outbox);
    }
    attend(commands, &command, arrived, inbox, outbox)
}

/// Sends output to a host that reads beside the attached one, until the command has ended or the
/// connection is lost.
fn observe(
    commands: &Commands,
    command: &Arc<Command>,
    arrived: Acknowledge,
    mut inbox: Inbox,
    outbox: &Outbox,
) -> Result<(), End> {
    let started = Started {
        id: command.id,
        pid: command.pid,
        ..Started::default()
    };
    outbox.send(from_agent::Kind::Started(started))?;
    let mut observer = command.observe(arrived);
    let (number, listener) = (observer.number, Arc::clone(command));
    let listen = move || {
        while let Ok(message) = inbox.receive() {
            match message {
                Some(from_host::Kind::Signal(signal)) if SIGNALS.contains(&signal) => {
                    listener.signal(signal);
                }
                // Input and acknowledgements are the attached host's.
                _ => {}
            }
        }
        listener.stop_observing(number);
    };
    thread::Builder::new()
        .name("observe".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(listen)
        .map_err(|error| Refusal::io("cannot start a thread", &error))?;
    loop {
        match command.next_observed(&mut observer) {
            Piece::Output {
                stream,
                cursor,
                data,
            } => {
                let output = Output {
                    stream: stream.into(),
                    cursor,
                    data,
                };
                let sent = outbox.send(from_agent::Kind::Output(output));
                if sent.is_err() {
                    command.stop_observing(number);
                    return sent;
                }
            }
            Piece::Exited(exited) => {
                let sent = outbox.send(from_agent::Kind::Exited(exited));
                command.stop_observing(number);
                if sent.is_ok() && !command.mark_seen() {
                    commands.forget(command.id);
                }
                return sent;
            }
            Piece::Replaced => return Err(End::Lost),
        }
    }
}

/// Sends output to the host on this thread, and passes the host's messages to the command on
/// another, until the command has ended or the connection is lost.
fn attend(
    commands: &Commands,
    command: &Arc<Command>,
    arrived: Acknowledge,
    inbox: Inbox,
    outbox: &Outbox,
) -> Result<(), End> {
    let seat = command.attach(arrived)?;
    outbox.send(from_agent::Kind::Started(command.started(outbox)))?;
    let listener = Arc::clone(command);
    let listen = move || listen(&listener, seat, inbox);
    thread::Builder::new()
        .name("listen".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(listen)
        .map_err(|error| Refusal::io("cannot start a thread", &error))?;
    loop {
        match command.next_piece(seat) {
            Piece::Output {
                stream,
                cursor,
                data,
            } => {
                let output = Output {
                    stream: stream.into(),
                    cursor,
                    data,
                };
                if let Err(end) = outbox.send(from_agent::Kind::Output(output)) {
                    command.detach(seat);
                    return Err(end);
                }
            }
            Piece::Exited(exited) => {
                let sent = outbox.send(from_agent::Kind::Exited(exited));
                command.detach(seat);
                if sent.is_ok() && !command.mark_seen() {
                    commands.forget(command.id);
                }
                return sent;
            }
            // Another session was attached, or the connection is lost.
            Piece::Replaced => return Err(End::Lost),
        }
    }
}

/// Handles the host's messages until the connection ends.
fn listen(command: &Arc<Command>, seat: u64, mut inbox: Inbox) {
    while let Ok(message) = inbox.receive() {
        match message {
            Some(from_host::Kind::Stdin(data)) => {
                let fed = command.feed(data);
                // A host that sends more than the window breaks the protocol.
                if fed.is_err() {
                    break;
                }
            }
            Some(from_host::Kind::StdinEnd(_)) => command.end_input(),
            Some(from_host::Kind::Signal(signal)) if SIGNALS.contains(&signal) => {
                // The signal has no effect on a command that has ended.
                command.signal(signal);
            }
            Some(from_host::Kind::Resize(size)) => command.resize(size),
            Some(from_host::Kind::Acknowledge(arrived)) => command.acknowledge(arrived),
            _ => {}
        }
    }
    command.detach(seat);
    command.connection_lost();
}

/// The streams of a command, in the order of their numbers.
const STREAMS: [Stream; 2] = [Stream::Stdout, Stream::Stderr];
