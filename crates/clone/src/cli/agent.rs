//! Connects to the agent in a guest, and runs a command there with this process's streams.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use agent_proto::client::{ClientError, Connection, Deadline, Event, Input, Running};
use agent_proto::messages::{ErrorCode as AgentCode, Exec, Exited, Stream, TerminalSize};
use clone_api::{ApiError, Client, ErrorCode};
use clone_host::runtime::RunningVm;
use clone_start::error::Result;

use super::signals::Signals;
use super::terminal::{self, RawTerminal};

/// The time limit for an agent's greeting.
const GREETING_LIMIT: Duration = Duration::from_secs(20);

/// The time beyond a command's limit in which the agent must report the command's end.
const TIMEOUT_GRACE: Duration = Duration::from_secs(15);

/// The pause between two attempts to connect to an agent.
const PAUSE: Duration = Duration::from_millis(100);

/// The signals that are forwarded to the guest's command.
const FORWARDED: [i32; 6] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// The number of SIGINT or SIGTERM that ends the wait for a command, as in Docker.
const WISHES_TO_GIVE_UP: u32 = 3;

/// How long a guest is given for its agent to start.
#[derive(Debug, Default, Clone, Copy, clap::Args)]
pub(super) struct Wait {
    /// Wait up to this number of seconds for a guest that is still starting.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
}

/// Connects to the agent of `vm`. The connection's deadline is for one short exchange.
///
/// The host is not notified when a guest's program starts to listen, so waiting means repeated
/// attempts. It ends early if the VM ends.
pub(super) fn connect(vm: &RunningVm, wait: Wait) -> Result<Connection> {
    let end = Instant::now() + Duration::from_secs(wait.wait);
    loop {
        let tried = Connection::open(&vm.dir.vsock_socket(), Deadline::after(GREETING_LIMIT));
        let may_come = matches!(tried, Err(ClientError::NoAgent)) && Instant::now() < end;
        if !may_come {
            return tried.map_err(agent_error(&vm.dir.name()));
        }
        if vm.process.wait(Some(PAUSE))? {
            let message = format!("`{}` ended before its agent answered", vm.dir.name());
            return Err(ApiError::new(ErrorCode::Unavailable, message)
                .advise("a VM in the foreground (clone run without --detach) shows why"));
        }
    }
}

/// Asks the agent of `vm` to switch its guest off, and waits for the answer within `limit`.
pub(super) fn shut_down_within(vm: &RunningVm, limit: Duration) -> Result<()> {
    Connection::open(&vm.dir.vsock_socket(), Deadline::after(limit))
        .and_then(|agent| agent.shutdown(false))
        .map_err(agent_error(&vm.dir.name()))
}

/// Makes a closure that converts an error of the agent's client for the user of the VM `name`.
pub(super) fn agent_error(name: &str) -> impl Fn(ClientError) -> ApiError {
    move |error| {
        let message = format!("`{name}`: {error}");
        match &error {
            ClientError::Connect { .. } => ApiError::new(ErrorCode::Unavailable, message)
                .advise("exec, shell and cp need a VM that was started without --no-vsock"),
            ClientError::NoAgent => ApiError::new(ErrorCode::Unavailable, message).advise(
                format!("while the guest starts, add --wait 60; look at it with: clone attach {name}; images made by `clone image build --agent` have the agent"),
            ),
            ClientError::Late => ApiError::new(ErrorCode::Unavailable, message)
                .advise(format!("see what the guest does: clone attach {name}")),
            ClientError::TooLong { .. } => ApiError::new(ErrorCode::InvalidConfig, message)
                .advise("send long input over standard input (clone exec -i) or as a file (clone cp)"),
            ClientError::Refused(refusal) => {
                let code = match refusal.code() {
                    AgentCode::NotFound => ErrorCode::NotFound,
                    AgentCode::Invalid => ErrorCode::InvalidConfig,
                    AgentCode::Unsupported | AgentCode::Exhausted => ErrorCode::Unavailable,
                    AgentCode::Denied | AgentCode::Other => ErrorCode::Internal,
                };
                ApiError::new(code, message)
            }
            ClientError::TooMuch(_) => ApiError::new(ErrorCode::TooLarge, message),
            _ => ApiError::new(ErrorCode::Internal, message),
        }
    }
}

/// Why a connection to the agent of `vm` that began at `begun_ns` was lost, where that is known: the
/// VM was rewound, which ends what it had.
pub(super) fn why_lost(vm: &RunningVm, begun_ns: u64) -> Option<ApiError> {
    let info = Client::new(vm.dir.control_socket()).info().ok()?;
    let rewound = info.rewound.filter(|it| it.monotonic_ns > begun_ns)?;
    let (name, checkpoint) = (vm.dir.name(), rewound.checkpoint);
    let message =
        format!("`{name}` was rewound to the checkpoint `{checkpoint}`, which ended the command");
    Some(ApiError::new(ErrorCode::Unavailable, message).advise("run it again"))
}

/// The present time of the host's `CLOCK_MONOTONIC`, which all processes share.
pub(super) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The connections between this process's streams and the command's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams {
    /// Whether this process's input is sent to the command.
    pub(super) input: bool,
    /// Whether this process's terminal becomes the command's: it is set to raw mode, and its size
    /// is passed on.
    pub(super) terminal: bool,
}

/// Runs `exec` with this process's streams until it ends, or until the user gives up waiting.
pub(super) fn run(
    name: &str,
    connection: Connection,
    mut exec: Exec,
    streams: Streams,
) -> std::result::Result<Exited, ClientError> {
    let mut taken = FORWARDED.to_vec();
    if streams.terminal {
        taken.push(libc::SIGWINCH);
        exec.terminal = Some(terminal_size());
    }
    exec.input = streams.input;
    // Until the command runs, signals have their default effect and end this process.
    let mut running = timed(connection.exec(exec.clone())?, &exec);
    // The signals are blocked before the threads below start, which inherit that.
    let signals = Signals::take(&taken).map_err(ClientError::Local)?;
    let stdin = io::stdin();
    let raw = if streams.terminal && stdin.is_terminal() {
        Some(RawTerminal::enter(&stdin).map_err(ClientError::Local)?)
    } else {
        None
    };
    // The threads are not joined and end with this process, since they may wait forever.
    let input = running.input();
    let given_up = Arc::new(AtomicI32::new(0));
    let flag = Arc::clone(&given_up);
    std::thread::spawn(move || forward(&input, signals, &flag));
    if streams.input {
        let input = running.input();
        std::thread::spawn(move || feed(&input));
    }
    let end = print(&mut running);
    drop(raw);
    match (end, given_up.load(Ordering::Acquire)) {
        // The exit code is as if the signal had ended the command, which may still run.
        (Err(_), signal @ 1..) => Ok(Exited {
            signal: Some(signal),
            ..Exited::default()
        }),
        (Err(ClientError::Lost(error)), _) => {
            tracing::debug!(name, "the connection was lost while a command ran");
            Err(ClientError::Lost(error))
        }
        (end, _) => end,
    }
}

/// Sets the command's deadline from `exec`; without a limit the command is streamed.
pub(super) fn timed(mut running: Running, exec: &Exec) -> Running {
    if exec.timeout_ms == 0 {
        return running.streaming();
    }
    let limit = Duration::from_millis(exec.timeout_ms);
    running.set_deadline(Deadline::after(limit.saturating_add(TIMEOUT_GRACE)));
    running
}

/// Prints the command's output until it ends.
fn print(running: &mut Running) -> std::result::Result<Exited, ClientError> {
    loop {
        match running.next_event()? {
            Event::Output(Stream::Stdout, data) => write(&mut io::stdout(), &data)?,
            Event::Output(Stream::Stderr, data) => write(&mut io::stderr(), &data)?,
            Event::Lost(stream, bytes) => {
                tracing::warn!(?stream, bytes, "output was lost");
            }
            Event::Exited(exited) => return Ok(exited),
        }
    }
}

fn write(out: &mut impl Write, data: &[u8]) -> std::result::Result<(), ClientError> {
    out.write_all(data)
        .and_then(|()| out.flush())
        .map_err(ClientError::Local)
}

fn terminal_size() -> TerminalSize {
    match terminal::size(io::stdin()) {
        Some(size) => TerminalSize {
            rows: size.ws_row.into(),
            columns: size.ws_col.into(),
        },
        None => TerminalSize {
            rows: 24,
            columns: 80,
        },
    }
}

/// Forwards signals and the terminal's size to the command. A guest that hangs must not block the
/// user, so the third request to end it closes the connection.
fn forward(input: &Input, mut signals: Signals, given_up: &AtomicI32) {
    let mut wishes = 0;
    while let Ok(signal) = signals.next() {
        wishes += u32::from(matches!(signal, libc::SIGINT | libc::SIGTERM));
        if wishes == WISHES_TO_GIVE_UP {
            given_up.store(signal, Ordering::Release);
            return input.disconnect();
        }
        // A separate thread sends this, since it blocks while the guest reads nothing.
        let input = input.clone();
        std::thread::spawn(move || match signal {
            libc::SIGWINCH => input.resize(terminal_size()),
            signal => input.signal(signal),
        });
    }
}

/// Sends this process's input, until it ends or the command has ended.
fn feed(input: &Input) {
    let stdin = io::stdin();
    let mut buffer = vec![0; 32 << 10];
    loop {
        let sent = match rustix::io::read(stdin.as_fd(), &mut buffer) {
            Ok(count) if count > 0 => input.write(&buffer[..count]),
            Err(rustix::io::Errno::INTR) => continue,
            Ok(_) | Err(_) => {
                // If the command has ended, the other thread reports how.
                let _ = input.end();
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}
