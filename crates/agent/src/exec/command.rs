//! A command from its start until its end was seen.
//!
//! Threads: one per output fills the spools, one waits for the process, one feeds its input. They
//! and the sessions meet in [`Shared`], under one lock that is never held across a system call
//! that can wait.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use agent_proto::messages::{Acknowledge, ErrorCode, Exec, Exited, Started, Stream, TerminalSize};
use agent_proto::{CHUNK, OUTPUT_WINDOW};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::termios::tcsetwinsize;

use super::STREAMS;
use super::input::{Input, Overrun};
use super::spawn::{self, Spawned, winsize};
use super::spool::Spool;
use crate::session::{Outbox, Refusal, STACK_BYTES};

/// How long what a command left in the background may hold its outputs open after its end.
const LINGER: Duration = Duration::from_millis(500);

/// What a session should pass on next.
pub(super) enum Piece {
    Output {
        stream: Stream,
        cursor: u64,
        data: Vec<u8>,
    },
    /// The process ended and all output was sent.
    Exited(Exited),
    /// The session is not attached any more.
    Replaced,
}

/// See the module.
pub(crate) struct Command {
    pub(super) id: u64,
    pub(super) pid: u32,
    pub(super) words: Vec<String>,
    detached: bool,
    input: Option<Input>,
    terminal: Option<OwnedFd>,
    shared: Mutex<Shared>,
    changed: Condvar,
}

struct Shared {
    spools: Vec<Spool>,
    exited: Option<Exited>,
    /// Which session is attached; 0 is none. Each gets a number of its own.
    seat: u64,
    last_seat: u64,
    /// Whether its process and the reading of its outputs are over.
    reaped: bool,
}

impl Command {
    pub(super) fn start(id: u64, request: &Exec) -> Result<Arc<Self>, Refusal> {
        let Spawned {
            child,
            input,
            outputs,
            terminal,
        } = spawn::spawn(request)?;
        let no_thread = |error| Refusal::io("cannot start a thread", &error);
        let input = input.map(Input::start).transpose().map_err(no_thread)?;
        let command = Arc::new(Self {
            id,
            pid: child.id(),
            words: request.command.clone(),
            detached: request.detached,
            input,
            terminal,
            shared: Mutex::new(Shared {
                spools: outputs.iter().map(|_| Spool::new(OUTPUT_WINDOW)).collect(),
                exited: None,
                seat: 0,
                last_seat: 0,
                reaped: false,
            }),
            changed: Condvar::new(),
        });
        let spawn = |name: &str, work: Box<dyn FnOnce(&Command) + Send>| {
            let command = Arc::clone(&command);
            let builder = thread::Builder::new()
                .name(name.to_owned())
                .stack_size(STACK_BYTES);
            builder
                .spawn(move || work(&command))
                .map(drop)
                .map_err(no_thread)
        };
        for (index, output) in outputs.into_iter().enumerate() {
            spawn(
                "output",
                Box::new(move |command| command.read_output(index, output)),
            )?;
        }
        let timeout = Some(request.timeout_ms)
            .filter(|ms| *ms > 0)
            .map(Duration::from_millis);
        spawn(
            "wait",
            Box::new(move |command| command.wait_end(child, timeout)),
        )?;
        Ok(command)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, shared: MutexGuard<'a, Shared>) -> MutexGuard<'a, Shared> {
        self.changed
            .wait(shared)
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn started(&self) -> Started {
        Started {
            id: self.id,
            pid: self.pid,
        }
    }

    pub(super) fn exited(&self) -> Option<Exited> {
        self.lock().exited
    }

    pub(super) fn is_attached(&self) -> bool {
        self.lock().seat != 0
    }

    /// A session attaches, taking the place of one that may not know yet that it is lost.
    pub(super) fn attach(&self, arrived: Acknowledge) -> Result<u64, Refusal> {
        let mut shared = self.lock();
        let cursors = [arrived.stdout_cursor, arrived.stderr_cursor];
        for (spool, cursor) in shared.spools.iter_mut().zip(cursors) {
            spool.rewind(cursor);
            spool.acknowledge(cursor);
        }
        shared.last_seat = shared.last_seat.checked_add(1).ok_or_else(|| {
            Refusal::new(ErrorCode::Exhausted, "too many connections for one command")
        })?;
        shared.seat = shared.last_seat;
        let seat = shared.seat;
        drop(shared);
        self.changed.notify_all();
        Ok(seat)
    }

    pub(super) fn detach(&self, seat: u64) {
        let mut shared = self.lock();
        if shared.seat == seat {
            shared.seat = 0;
        }
        drop(shared);
        self.changed.notify_all();
    }

    /// The connection ended while the command runs. It goes on: somebody may come back for it.
    /// Only its terminal hangs up its input, as a modem line would not.
    pub(super) fn connection_lost(&self) {
        self.changed.notify_all();
    }

    /// Waits for something to pass on.
    pub(super) fn next_piece(&self, seat: u64) -> Piece {
        let mut shared = self.lock();
        loop {
            if shared.seat != seat {
                return Piece::Replaced;
            }
            for (index, stream) in STREAMS.into_iter().enumerate() {
                let next = shared
                    .spools
                    .get_mut(index)
                    .and_then(|spool| spool.next(CHUNK));
                if let Some((cursor, data)) = next {
                    return Piece::Output {
                        stream,
                        cursor,
                        data,
                    };
                }
            }
            if let Some(exited) = shared.exited
                && shared.spools.iter().all(Spool::is_finished)
            {
                return Piece::Exited(exited);
            }
            shared = self.wait(shared);
        }
    }

    pub(super) fn acknowledge(&self, arrived: Acknowledge) {
        let mut shared = self.lock();
        let cursors = [arrived.stdout_cursor, arrived.stderr_cursor];
        for (spool, cursor) in shared.spools.iter_mut().zip(cursors) {
            spool.acknowledge(cursor);
        }
        drop(shared);
        self.changed.notify_all();
    }

    pub(super) fn feed(&self, data: Vec<u8>, host: &Outbox) -> Result<(), Overrun> {
        self.input
            .as_ref()
            .map_or(Ok(()), |input| input.push(data, host))
    }

    pub(super) fn end_input(&self) {
        if let Some(input) = &self.input {
            input.end();
        }
    }

    pub(super) fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = &self.terminal {
            // A terminal whose command is gone does not mind.
            let _ = tcsetwinsize(terminal, winsize(size));
        }
    }

    /// Signals the process group, as long as its leader was not reaped: later its number may be
    /// somebody else's.
    pub(super) fn signal(&self, signal: i32) {
        let Some(signal) = Signal::from_named_raw(signal) else {
            return;
        };
        let shared = self.lock();
        if !shared.reaped {
            self.signal_group(signal);
        }
    }

    fn signal_group(&self, signal: Signal) {
        if let Some(group) = Pid::from_raw(self.pid as i32) {
            let _ = kill_process_group(group, signal);
        }
    }

    /// Reads an output to its end, no faster than it is taken.
    fn read_output(&self, index: usize, mut output: File) {
        let mut chunk = vec![0; CHUNK.min(32 << 10)];
        loop {
            // A terminal whose command is gone answers with an error: its end.
            let len = output.read(&mut chunk).unwrap_or(0);
            let mut shared = self.lock();
            if len == 0 {
                shared.spools[index].close();
                break;
            }
            let mut rest = &chunk[..len];
            while !rest.is_empty() {
                if self.detached && shared.seat == 0 {
                    shared.spools[index].drop_oldest_for(rest.len());
                }
                let fits = shared.spools[index].room().min(rest.len());
                shared.spools[index].push(&rest[..fits]);
                rest = &rest[fits..];
                self.changed.notify_all();
                if !rest.is_empty() {
                    shared = self.wait(shared);
                }
            }
        }
        self.changed.notify_all();
    }

    /// Waits for the process, ending it when its time is up.
    fn wait_end(&self, mut child: Child, timeout: Option<Duration>) {
        let timed_out = timeout.is_some_and(|timeout| !self.ends_within(timeout));
        if timed_out {
            self.signal_group(Signal::KILL);
        }
        let status = child.wait();
        let mut shared = self.lock();
        shared.reaped = true;
        let (code, signal) = status.map_or((None, None), |status| (status.code(), status.signal()));
        shared.exited = Some(Exited {
            code,
            signal,
            timed_out,
        });
        drop(shared);
        self.changed.notify_all();
        self.close_abandoned_outputs();
    }

    fn ends_within(&self, timeout: Duration) -> bool {
        let pid = Pid::from_raw(self.pid as i32);
        let Some(Ok(pidfd)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
            return true;
        };
        let limit = Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        let mut ready = [PollFd::new(&pidfd, PollFlags::IN)];
        // An error here would be of no memory: then the command is left alone.
        !matches!(poll(&mut ready, Some(&limit)), Ok(0))
    }

    /// What a command left in the background may hold its outputs open for ever, but its caller
    /// waits for the end: after a moment without anything new the outputs count as ended.
    fn close_abandoned_outputs(&self) {
        let mut shared = self.lock();
        loop {
            if shared.spools.iter().all(Spool::is_finished) {
                return;
            }
            let wait = self.changed.wait_timeout(shared, LINGER);
            let (woken, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
            shared = woken;
            // Nobody attached: whoever comes may still want what is there.
            if timeout.timed_out()
                && shared.seat != 0
                && shared.spools.iter().all(Spool::is_drained)
            {
                shared.spools.iter_mut().for_each(Spool::close);
                self.changed.notify_all();
                return;
            }
            if timeout.timed_out() && shared.seat == 0 {
                shared = self.wait(shared);
            }
        }
    }
}
