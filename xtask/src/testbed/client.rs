//! Running a command in a testbed, from outside.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use super::wire::{self, Kind, MAX_PAYLOAD, Start};
use super::{PORTS, Testbed};

/// How our own ends of a command are reported, as `timeout(1)` does.
const EXIT_TIMEOUT: u8 = 124;

/// How long an answer to a greeting is waited for before it is said again. A host that comes soon
/// after another is often not answered: the port still counts as closed inside.
const GREET_AGAIN: Duration = Duration::from_millis(100);
/// It is waited for twice as long each time, up to this: greetings pile up while a testbed boots.
const GREET_AT_LAST: Duration = Duration::from_secs(4);
/// How a command that could not be started is reported, as shells do.
const EXIT_NOT_STARTED: u8 = 127;

/// A port that nobody else uses, connected and in step.
struct Session {
    stream: UnixStream,
    /// Held as long as the session: the port is ours.
    _lock: File,
}

/// Whether the testbed answers. `None` while QEMU has not made its sockets.
pub(super) fn ping(testbed: &Testbed, deadline: Instant) -> Result<Option<bool>> {
    let Some(session) = Session::open(testbed)? else {
        return Ok(None);
    };
    let left = deadline.saturating_duration_since(Instant::now());
    Ok(Some(session.synchronise(left).is_ok()))
}

impl Session {
    /// Connects to a free port; `None` where the sockets are not there yet.
    fn open(testbed: &Testbed) -> Result<Option<Self>> {
        for port in 0..PORTS {
            let lock = File::create(testbed.folder().join(format!("port{port}.lock")))?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            return match connect_in(testbed, &format!("port{port}")) {
                Ok(stream) => Ok(Some(Self {
                    stream,
                    _lock: lock,
                })),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(None),
                Err(error) => Err(error).context("cannot connect to the testbed"),
            };
        }
        bail!("{PORTS} commands run in this testbed already: wait for one to end")
    }

    /// Throws away what an earlier session left in the port, in both directions: a greeting is
    /// said until it comes back.
    fn synchronise(&self, limit: Duration) -> Result<()> {
        let mut nonce = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        let mut stream = &self.stream;
        let mut patience = GREET_AGAIN;
        stream.set_read_timeout(Some(patience))?;
        // A port that takes nothing must not hold us beyond the limit.
        stream.set_write_timeout(Some(limit.max(GREET_AGAIN)))?;
        let deadline = Instant::now() + limit;
        wire::write(&mut stream, Kind::Sync, &nonce)?;
        // The answer's payload is found wherever it starts.
        let mut seen = [0; 16];
        while seen != nonce {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(0) => bail!("the port was closed"),
                Ok(_) => {
                    seen.rotate_left(1);
                    seen[15] = byte[0];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    anyhow::ensure!(Instant::now() < deadline, "no answer within {limit:?}");
                    wire::write(&mut stream, Kind::Sync, &nonce)?;
                    patience = (patience * 2).min(GREET_AT_LAST);
                    stream.set_read_timeout(Some(patience))?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok(())
    }
}

/// Connects to a socket in the testbed's folder, whose own path may be longer than a socket
/// address holds.
fn connect_in(testbed: &Testbed, name: &str) -> io::Result<UnixStream> {
    let folder = open(
        testbed.folder(),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let path = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    let fd: OwnedFd = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    connect(&fd, &SocketAddrUnix::new(path.as_str())?)?;
    Ok(fd.into())
}

/// Runs `command` inside and returns its exit status.
pub(super) fn run(
    testbed: &Testbed,
    command: &[OsString],
    timeout: Option<u64>,
    terminal: bool,
) -> Result<ExitCode> {
    let session = Session::open(testbed)?.context("the testbed has no sockets")?;
    session
        .synchronise(Duration::from_secs(30))
        .with_context(|| format!("the testbed does not answer\n{}", testbed.logs()))?;
    let start = Start {
        terminal: terminal.then(window_size),
        folder: std::env::current_dir()?.display().to_string(),
        command: command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
        // cargo's own search path for libraries would have every start look for them in a dozen
        // folders over 9p.
        environment: std::env::vars()
            .filter(|(name, _)| name != "LD_LIBRARY_PATH")
            .collect(),
    };
    let out = Arc::new(Mutex::new(session.stream.try_clone()?));
    send(&out, Kind::Start, &start.encode())?;
    let _raw = terminal.then(RawTerminal::enter).transpose()?;
    forward_input(Arc::clone(&out));
    if terminal {
        forward_size(Arc::clone(&out));
    }
    let limit = timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let result = pass_output(&session.stream, limit);
    match result {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(error) if is_timeout(&error) => {
            eprintln!(
                "error: the command ran longer than {} s and was ended",
                timeout.unwrap_or(0)
            );
            Ok(ExitCode::from(EXIT_TIMEOUT))
        }
        Err(error) => Err(error)
            .with_context(|| format!("the testbed died under the command\n{}", testbed.logs())),
    }
}

fn is_timeout(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(
        kind,
        Some(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
    )
}

fn send(out: &Mutex<UnixStream>, kind: Kind, payload: &[u8]) -> io::Result<()> {
    wire::write(
        &mut *out.lock().unwrap_or_else(PoisonError::into_inner),
        kind,
        payload,
    )
}

/// Prints what the command prints until it ends.
fn pass_output(mut stream: &UnixStream, deadline: Option<Instant>) -> Result<u8> {
    loop {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        }
        let (kind, payload) = wire::read(&mut stream)?;
        match kind {
            Kind::Stdout => {
                io::stdout().write_all(&payload)?;
                io::stdout().flush()?;
            }
            Kind::Stderr => io::stderr().write_all(&payload)?,
            Kind::Exit => return Ok(payload.first().copied().unwrap_or(u8::MAX)),
            Kind::Failed => {
                eprintln!("error: {}", String::from_utf8_lossy(&payload));
                return Ok(EXIT_NOT_STARTED);
            }
            _ => {}
        }
    }
}

/// Passes our input on, on a thread of its own that ends with the process.
fn forward_input(out: Arc<Mutex<UnixStream>>) {
    thread::spawn(move || {
        let mut chunk = vec![0; MAX_PAYLOAD];
        loop {
            let len = io::stdin().read(&mut chunk).unwrap_or(0);
            if send(&out, Kind::Stdin, &chunk[..len]).is_err() || len == 0 {
                return;
            }
        }
    });
}

/// Passes the window's size on whenever it changes.
fn forward_size(out: Arc<Mutex<UnixStream>>) {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: it writes an empty set to where it is told, which is ours.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset has initialised it, and cannot fail with a valid pointer.
    let mut set = unsafe { set.assume_init() };
    // SAFETY: the set is initialised and ours.
    unsafe { libc::sigaddset(&mut set, libc::SIGWINCH) };
    // SAFETY: the set is initialised; blocking a signal that we wait for has no other effect.
    // Threads made later inherit the mask, which is harmless.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    thread::spawn(move || {
        loop {
            let mut signal = 0;
            // SAFETY: both point to live values.
            unsafe { libc::sigwait(&set, &mut signal) };
            let (rows, columns) = window_size();
            let payload = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
            if send(&out, Kind::Resize, &payload).is_err() {
                return;
            }
        }
    });
}

fn window_size() -> (u16, u16) {
    tcgetwinsize(io::stdout()).map_or((24, 80), |size| (size.ws_row, size.ws_col))
}

/// Our terminal in raw mode, put back at the end.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let stdin = io::stdin();
        if !isatty(stdin.as_fd()) {
            return Ok(Self(None));
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}
