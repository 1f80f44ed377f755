//! The inside of a testbed: PID 1, and the supervisor that runs commands for the sessions on its
//! ports.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, wait};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::PORTS;
use super::wire::{self, Kind, MAX_PAYLOAD, Start};

/// As PID 1 starts itself again and buries what dies; as PID 1's child serves all ports for ever.
pub(super) fn main() -> Result<ExitCode> {
    if rustix::process::getpid().is_init() {
        bury_orphans()
    } else {
        serve_ports()
    }
}

/// Orphans of commands become children of PID 1. One that nobody waits for stays a zombie, which
/// a test that asks whether the process is gone takes for alive.
fn bury_orphans() -> Result<ExitCode> {
    let supervisor = Command::new(std::env::current_exe()?)
        .args(["testbed", "supervise"])
        .spawn()
        .context("cannot start the supervisor")?;
    let supervisor = Pid::from_child(&supervisor);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((ended, _))) if ended == supervisor => {
                anyhow::bail!("the supervisor ended")
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for children"),
        }
    }
}

/// Interrupts that change nothing, each second; docs/testbed.md says what they are for.
const NUDGES: u32 = 100;
/// The frequency of the PC's interval timer.
const PIT_HZ: u32 = 1_193_182;

/// Starts the interval timer, which Linux has left for the local APIC's by now. Its interrupt has a
/// handler that does nothing, and has QEMU look for others that it forgot.
fn nudge() -> io::Result<()> {
    let ports = OpenOptions::new().write(true).open("/dev/port")?;
    let [low, high, ..] = (PIT_HZ / NUDGES).to_le_bytes();
    // Channel 0, both bytes of the count, again and again.
    for (port, byte) in [(0x43, 0x34), (0x40, low), (0x40, high)] {
        std::os::unix::fs::FileExt::write_all_at(&ports, &[byte], port)?;
    }
    Ok(())
}

fn serve_ports() -> Result<ExitCode> {
    nudge().context("cannot start the interval timer")?;
    let threads: Vec<_> = (0..PORTS)
        .map(|port| {
            thread::spawn(move || {
                if let Err(error) = serve(port) {
                    eprintln!("testbed: port {port}: {error:#}");
                }
            })
        })
        .collect();
    for thread in threads {
        let _ = thread.join();
    }
    anyhow::bail!("all ports of the testbed are gone")
}

/// A port's device, non-blocking, so that a host that goes away is noticed.
struct Port {
    file: File,
    changes: OwnedFd,
}

impl Port {
    fn open(index: usize) -> Result<Self> {
        let path = find(&format!("port{index}"))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open(&path)
            .with_context(|| format!("cannot open {path}"))?;
        let changes = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edges: a port without a host is always "hung up", which must not spin.
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&changes, &file, epoll::EventData::new_u64(0), interest)?;
        Ok(Self { file, changes })
    }

    /// Throws away what a session left that ended in the middle of a frame. A host that came
    /// meanwhile says its greeting again.
    fn discard(&self) {
        let mut rest = [0; 4096];
        while matches!((&self.file).read(&mut rest), Ok(1..)) {}
    }

    /// Waits until something about the port changes.
    fn wait_change(&self) -> io::Result<()> {
        let mut events = [const {
            epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }
        }; 1];
        match epoll::wait(&self.changes, &mut events, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Finds a port by the name that QEMU gave it.
fn find(name: &str) -> Result<String> {
    for entry in std::fs::read_dir("/sys/class/virtio-ports").context("no virtio-serial")? {
        let entry = entry?;
        let given = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if given.trim() == name {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    anyhow::bail!("QEMU gave no port the name {name}")
}

/// Reads that wait, as long as the host is there; its absence is the end of the stream.
impl Read for &Port {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.file).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_change()?,
                other => return other,
            }
        }
    }
}

/// Writes that wait for room; a host that is gone is an error.
impl Write for &Port {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.file).write(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            let mut ready = [PollFd::new(&self.file, PollFlags::OUT)];
            poll(&mut ready, None)?;
            if ready[0].revents().contains(PollFlags::HUP) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serve(index: usize) -> Result<()> {
    let port = Arc::new(Port::open(index)?);
    loop {
        // An error means that the host went away or got out of step: the next session starts anew.
        if let Err(error) = session(&port) {
            // At the end of the stream nothing of that session is left; what is there by now is the
            // next one's greeting.
            if error.kind() != io::ErrorKind::UnexpectedEof {
                port.discard();
            }
            port.wait_change()?;
        }
    }
}

/// One session: until the host goes away.
fn session(port: &Arc<Port>) -> io::Result<()> {
    let out = Arc::new(Mutex::new(()));
    let mut command: Option<Running> = None;
    let result = loop {
        let (kind, payload) = match wire::read(&mut port.as_ref()) {
            Ok(frame) => frame,
            Err(error) => break Err(error),
        };
        match kind {
            Kind::Sync => send(port, &out, Kind::Sync, &payload)?,
            Kind::Start => match Running::start(port, &out, &payload) {
                Ok(running) => command = Some(running),
                Err(error) => send(port, &out, Kind::Failed, format!("{error:#}").as_bytes())?,
            },
            Kind::Stdin => {
                if let Some(command) = &mut command {
                    command.input(&payload);
                }
            }
            Kind::Resize => {
                if let Some(command) = &command {
                    command.resize(&payload);
                }
            }
            _ => {}
        }
    };
    if let Some(command) = command {
        command.end();
    }
    result
}

fn send(port: &Port, turn: &Mutex<()>, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    wire::write(&mut &*port, kind, payload)
}

/// A command that was started for a session.
struct Running {
    group: Pid,
    input: Option<Box<dyn Write + Send>>,
    terminal: Option<OwnedFd>,
}

impl Running {
    fn start(port: &Arc<Port>, turn: &Arc<Mutex<()>>, payload: &[u8]) -> Result<Self> {
        let start = Start::decode(payload).context("a start frame that cannot be read")?;
        let mut command = Command::new(&start.command[0]);
        command
            .args(&start.command[1..])
            .current_dir(&start.folder)
            .env_clear()
            .envs(start.environment.iter().cloned())
            .env("CLONE_TESTBED", "1");
        let (child, input, outputs, terminal) = match start.terminal {
            Some(size) => spawn_with_terminal(&mut command, size)?,
            None => spawn_with_pipes(&mut command)?,
        };
        let group = Pid::from_child(&child);
        let pumps: Vec<_> = outputs
            .into_iter()
            .map(|(kind, output)| {
                let (port, turn) = (Arc::clone(port), Arc::clone(turn));
                thread::spawn(move || pump(&port, &turn, kind, output))
            })
            .collect();
        let (port, turn) = (Arc::clone(port), Arc::clone(turn));
        thread::spawn(move || report_end(child, &port, &turn, pumps));
        Ok(Self {
            group,
            input: Some(input),
            terminal,
        })
    }

    fn input(&mut self, bytes: &[u8]) {
        // A command that does not read its input may end: that is no error of ours.
        let gone = match &mut self.input {
            Some(input) if !bytes.is_empty() => input.write_all(bytes).is_err(),
            _ => true,
        };
        if gone {
            self.input = None;
        }
    }

    fn resize(&self, payload: &[u8]) {
        if let (Some(terminal), [r0, r1, c0, c1]) = (&self.terminal, payload) {
            let _ = tcsetwinsize(
                terminal,
                winsize(
                    u16::from_le_bytes([*r0, *r1]),
                    u16::from_le_bytes([*c0, *c1]),
                ),
            );
        }
    }

    fn end(self) {
        let _ = kill_process_group(self.group, Signal::KILL);
    }
}

type Output = (Kind, Box<dyn Read + Send>);
type Spawned = (Child, Box<dyn Write + Send>, Vec<Output>, Option<OwnedFd>);

fn spawn_with_pipes(command: &mut Command) -> Result<Spawned> {
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = spawn(command)?;
    let missing = "a pipe that was asked for";
    let input = child.stdin.take().context(missing)?;
    let stdout = child.stdout.take().context(missing)?;
    let stderr = child.stderr.take().context(missing)?;
    let outputs: Vec<Output> = vec![
        (Kind::Stdout, Box::new(stdout)),
        (Kind::Stderr, Box::new(stderr)),
    ];
    Ok((child, Box::new(input), outputs, None))
}

fn spawn_with_terminal(command: &mut Command, (rows, columns): (u16, u16)) -> Result<Spawned> {
    let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&main)?;
    unlockpt(&main)?;
    let path = ptsname(&main, Vec::new())?;
    let path = path.to_str().context("a terminal's name")?;
    let terminal = OpenOptions::new().read(true).write(true).open(path)?;
    tcsetwinsize(&terminal, winsize(rows, columns))?;
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    // SAFETY: setsid and ioctl are async-signal-safe, as what runs between fork and exec must be.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(io::stdin().as_fd())?;
            Ok(())
        });
    }
    let child = spawn(command)?;
    // Ours of the command's end would keep the terminal open after the command.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let input = File::from(main.try_clone()?);
    let output = File::from(main.try_clone()?);
    Ok((
        child,
        Box::new(input),
        vec![(Kind::Stdout, Box::new(output))],
        Some(main),
    ))
}

fn spawn(command: &mut Command) -> Result<Child> {
    let name = command.get_program().to_string_lossy().into_owned();
    command
        .spawn()
        .with_context(|| format!("cannot start {name} in the testbed"))
}

fn winsize(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Passes a command's output on until it ends.
fn pump(port: &Port, turn: &Mutex<()>, kind: Kind, mut output: Box<dyn Read + Send>) {
    let mut chunk = vec![0; MAX_PAYLOAD];
    loop {
        // A terminal's main end answers with EIO once the command is gone.
        let len = output.read(&mut chunk).unwrap_or(0);
        if len == 0 || send(port, turn, kind, &chunk[..len]).is_err() {
            return;
        }
    }
}

/// Tells how a command ended, after all its output.
fn report_end(mut child: Child, port: &Port, turn: &Mutex<()>, pumps: Vec<thread::JoinHandle<()>>) {
    let status = child.wait();
    // What it left in the background holds its pipes open; it ends with the command.
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    for pump in pumps {
        let _ = pump.join();
    }
    let code = status.map_or(255, |status| {
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    });
    let _ = send(port, turn, Kind::Exit, &[code as u8]);
}
