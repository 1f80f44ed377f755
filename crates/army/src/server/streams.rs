//! Commands in guests over one WebSocket: separate output streams, standard input, and signals.
//!
//! The agent in the guest keeps the command and its output. A client whose connection is lost
//! attaches again from where it was, at any server.

use std::time::{Duration, Instant};

use agent_client::{Event, Running};
use agent_proto::messages::{Acknowledge, Stream};
use army_api::Problem;
use army_api::exec::OutputStream;
use army_api::keys::Role;
use army_api::streams::{
    AttachStream, STDERR, STDIN, STDOUT, StartStream, StreamEvent, StreamRequest,
};
use army_api::vms::Vm;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use axum::response::Response;
use tokio::time::timeout;

use super::auth::Caller;
use super::extract::{Params, Path, Upgrade};
use super::sessions::{Ending, Followed, Guest};
use super::terminal::{INPUT_LIMIT, MAX_MESSAGE, send};
use super::{AGENT_LIMIT, Answer, App, Failure, PING_EVERY, SILENCE};
use army_controller::{Error, ErrorKind, guest};

/// The subprotocol that a browser offers beside its key.
const SUBPROTOCOL: &str = "army.exec";
/// How long a client may take to say what is to be started.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Output is acknowledged at least every so many bytes, well before the agent's window is full.
const ACKNOWLEDGE_EVERY: u64 = 64 << 10;

/// Runs a command in a VM over a WebSocket.
///
/// The first message of the client is `start`. Input and output are binary messages, whose first
/// byte says of which stream: 0 is standard input, 1 standard output, 2 standard error output. All
/// other messages are text: `StreamRequest`s of the client, and `StreamEvent`s of the server. The
/// command goes on when its client is lost: its output waits for a minute for a client that attaches
/// at `/v1/vms/{vm}/commands/{id}/stream`, and then only the newest is kept. A browser offers two
/// subprotocols: `army.exec`, and `army.key.` followed by its key.
#[utoipa::path(get, path = "/v1/vms/{vm}/exec", params(("vm" = String, Path)),
    responses((status = 101)))]
pub(super) async fn exec(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    let ending = app.sessions.ending(&caller);
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(|mut socket| async move {
        let mut start_ending = ending.clone();
        let begun = tokio::select! {
            begun = begin(&app, &caller, &vm, &mut socket) => begun,
            reason = start_ending.reason() => {
                send(&mut socket, Message::Close(Some(reason.close_frame()))).await;
                return;
            }
        };
        match begun {
            Ok(Some(stream)) => serve(stream, socket, ending).await,
            Ok(None) => {}
            Err(Failure(problem)) => fail(&mut socket, problem).await,
        }
    }))
}

/// Attaches to a command in a VM over a WebSocket, from a cursor on.
///
/// The messages are those of `/v1/vms/{vm}/exec`, without `start`. The client replaces the one that
/// is attached, unless it observes. The end of a command can be read for 10 minutes.
#[utoipa::path(get, path = "/v1/vms/{vm}/commands/{id}/stream",
    params(("vm" = String, Path), ("id" = u64, Path), AttachStream),
    responses((status = 101)))]
pub(super) async fn attach(
    State(app): State<App>,
    caller: Caller,
    Path((vm, id)): Path<(String, u64)>,
    Params(request): Params<AttachStream>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    caller.may(Role::User)?;
    let vm = caller.vm(&app, &vm).await?;
    let Guest { connection, ending } = app.guest(&caller, &vm, AGENT_LIMIT).await?;
    let arrived = Acknowledge {
        stdout_cursor: request.stdout,
        stderr_cursor: request.stderr,
    };
    let running = match request.observe {
        true => connection.observe(id, arrived).await,
        false => connection.attach(id, arrived).await,
    };
    let running = running.map_err(Error::from)?;
    let mut stream = CommandStream::new((&app, &caller, &vm), running, request.acknowledge);
    stream.running = stream.running.observing(request.observe);
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| serve(stream, socket, ending)))
}

/// Serves a command until it ends, its client disconnects, the caller's key is removed, or the server
/// stops. The command goes on.
async fn serve(stream: CommandStream, mut socket: WebSocket, mut ending: Ending) {
    let reason = tokio::select! {
        () = stream.serve(&mut socket) => return,
        reason = ending.reason() => reason,
    };
    send(&mut socket, Message::Close(Some(reason.close_frame()))).await;
}

/// Starts the command that the client's first message is about. `None` where the client goes away
/// before it.
async fn begin(
    app: &App,
    caller: &Caller,
    vm: &Vm,
    socket: &mut WebSocket,
) -> Answer<Option<CommandStream>> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidRequest, message);
    let Ok(message) = timeout(START_LIMIT, first_message(socket)).await else {
        return Err(invalid("the first message did not come in time".to_owned()).into());
    };
    let Some(text) = message else {
        return Ok(None);
    };
    let request = serde_json::from_str(&text);
    let request: StreamRequest = request.map_err(|error| invalid(error.to_string()))?;
    let StreamRequest::Start(start) = request else {
        return Err(invalid("the first message must be `start`".to_owned()).into());
    };
    guest::check_command(&start.command)?;
    let StartStream {
        input, acknowledge, ..
    } = start;
    let limit = start.timeout_ms.map(Duration::from_millis);
    let environment = app.controller.environment(vm).await?;
    let mut exec = guest::exec(start.into(), environment, limit);
    exec.input = input;
    exec.keep_ms = guest::KEEP_MS;
    let connection = app.guest(caller, vm, AGENT_LIMIT).await?.connection;
    let running = connection.exec(exec).await.map_err(Error::from)?;
    let place = (app, caller, vm);
    Ok(Some(CommandStream::new(place, running, acknowledge)))
}

/// The first text of a client.
async fn first_message(socket: &mut WebSocket) -> Option<String> {
    loop {
        match socket.recv().await? {
            Ok(Message::Text(text)) => return Some(text.to_string()),
            Ok(Message::Ping(_) | Message::Pong(_)) => {}
            // Data before the start has no place to go to.
            Ok(Message::Binary(_)) => return Some(String::new()),
            Ok(Message::Close(_)) | Err(_) => return None,
        }
    }
}

/// A command and its client.
struct CommandStream {
    running: Followed,
    /// Whether the client acknowledges output.
    acknowledges: bool,
    /// The number of bytes that were acknowledged for a client that does not.
    acknowledged: u64,
}

/// Whether a session goes on.
enum Next {
    GoOn,
    Over,
}

impl CommandStream {
    fn new((app, caller, vm): (&App, &Caller, &Vm), running: Running, acknowledges: bool) -> Self {
        let running = running.streaming().acknowledged_by_caller();
        Self {
            running: Followed::new(app, caller, vm, None, running),
            acknowledges,
            acknowledged: 0,
        }
    }

    /// Serves until the command ends or its client disconnects.
    async fn serve(mut self, socket: &mut WebSocket) {
        let started = self.running.get().started();
        let event = StreamEvent::Started {
            id: started.id,
            pid: started.pid,
            input: started.input_received,
        };
        if !send_event(socket, &event).await {
            return;
        }
        let mut ping = tokio::time::interval(PING_EVERY);
        let mut last_message = Instant::now();
        // When the guest began to accept no input.
        let mut full_since = None;
        loop {
            let accepts_input = self.running.get().accepts_input();
            match accepts_input {
                true => full_since = None,
                false => {
                    full_since.get_or_insert_with(Instant::now);
                    last_message = Instant::now();
                }
            }
            let next = tokio::select! {
                _ = ping.tick() => {
                    let is_full = full_since.is_some_and(|since| since.elapsed() > INPUT_LIMIT);
                    let is_silent = last_message.elapsed() > SILENCE;
                    match is_full || is_silent {
                        true => Next::Over,
                        false => next(send(socket, Message::Ping(Bytes::new())).await),
                    }
                }
                event = self.running.next_event() => match event {
                    Ok(event) => self.pass_on(socket, event).await,
                    Err(Failure(problem)) => {
                        fail(socket, problem).await;
                        Next::Over
                    }
                },
                message = socket.recv(), if accepts_input => match message {
                    Some(Ok(Message::Close(_)) | Err(_)) | None => Next::Over,
                    Some(Ok(message)) => {
                        last_message = Instant::now();
                        self.take(&message);
                        Next::GoOn
                    }
                },
            };
            if matches!(next, Next::Over) {
                return;
            }
        }
    }

    async fn pass_on(&mut self, socket: &mut WebSocket, event: Event) -> Next {
        match event {
            Event::Output(stream, data) => {
                let first = match stream {
                    Stream::Stdout => STDOUT,
                    Stream::Stderr => STDERR,
                };
                let mut message = Vec::with_capacity(data.len() + 1);
                message.push(first);
                message.extend(data);
                let sent = send(socket, Message::Binary(message.into())).await;
                if sent && !self.acknowledges {
                    self.acknowledge_sent();
                }
                next(sent)
            }
            Event::Lost(stream, bytes) => {
                let stream = match stream {
                    Stream::Stdout => OutputStream::Stdout,
                    Stream::Stderr => OutputStream::Stderr,
                };
                next(send_event(socket, &StreamEvent::Lost { stream, bytes }).await)
            }
            Event::Exited(exited) => {
                let ended = StreamEvent::Ended(guest::exit_status(exited));
                send_event(socket, &ended).await;
                close(socket, close_code::NORMAL, "ended").await;
                Next::Over
            }
        }
    }

    /// Acknowledges what was sent, now and then.
    fn acknowledge_sent(&mut self) {
        let arrived = self.running.get().arrived();
        let total = arrived.stdout_cursor.saturating_add(arrived.stderr_cursor);
        if total.saturating_sub(self.acknowledged) >= ACKNOWLEDGE_EVERY {
            self.acknowledged = total;
            self.running.get_mut().acknowledge(arrived);
        }
    }

    /// Takes a message of the client. What cannot be understood is ignored.
    fn take(&mut self, message: &Message) {
        match message {
            Message::Binary(bytes) => {
                if let Some((&STDIN, data)) = bytes.split_first() {
                    self.running.get_mut().write(data);
                }
            }
            Message::Text(text) => match serde_json::from_str(text) {
                Ok(StreamRequest::EndInput) => self.running.get_mut().end_input(),
                Ok(StreamRequest::Signal { signal }) => self.running.get_mut().signal(signal),
                Ok(StreamRequest::Acknowledge { stdout, stderr }) if self.acknowledges => {
                    // More than was sent cannot have arrived.
                    let sent = self.running.get().arrived();
                    self.running.get_mut().acknowledge(Acknowledge {
                        stdout_cursor: stdout.min(sent.stdout_cursor),
                        stderr_cursor: stderr.min(sent.stderr_cursor),
                    });
                }
                Ok(StreamRequest::Start(_) | StreamRequest::Acknowledge { .. }) | Err(_) => {}
            },
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) => {}
        }
    }
}

fn next(sent: bool) -> Next {
    match sent {
        true => Next::GoOn,
        false => Next::Over,
    }
}

/// Returns false where the client has disconnected.
async fn send_event(socket: &mut WebSocket, event: &StreamEvent) -> bool {
    let text = serde_json::to_string(event).unwrap_or_default();
    send(socket, Message::Text(text.into())).await
}

async fn fail(socket: &mut WebSocket, problem: Problem) {
    send_event(socket, &StreamEvent::Failed { problem }).await;
    close(socket, close_code::ERROR, "failed").await;
}

async fn close(socket: &mut WebSocket, code: u16, reason: &'static str) {
    let frame = CloseFrame {
        code,
        reason: reason.into(),
    };
    send(socket, Message::Close(Some(frame))).await;
}
