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
use std::time::{Duration, Instant};

use agent_proto::messages::{Acknowledge, ErrorCode, Exec, Exited, Started, Stream, TerminalSize};
use agent_proto::{CHUNK, OUTPUT_WINDOW};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::ioctl_fionread;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::termios::{tcgetpgrp, tcsetwinsize};

use super::STREAMS;
use super::input::{Input, Overrun};
use super::spawn::{self, Spawned, winsize};
use super::spool::Spool;
use crate::conversation::{Outbox, Refusal, STACK_BYTES};

/// How long after a command's end the output counts of what it left in the background.
const LINGER: Duration = Duration::from_millis(500);
/// How long a command waits for a host that may come back to it.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);
/// The bytes of a command's words that are kept for lists of commands.
const WORDS_KEPT: usize = 4 << 10;

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
    /// The host's side of its terminal, until that is hung up. Held for a moment only.
    terminal: Option<Mutex<Option<OwnedFd>>>,
    /// Readable once the command has ended, or its terminal was hung up: for who waits for output.
    news: OwnedFd,
    shared: Mutex<Shared>,
    changed: Condvar,
}

struct Shared {
    spools: Vec<Spool>,
    exited: Option<Exited>,
    /// Which session is attached; 0 is none. Each gets a number of its own.
    seat: u64,
    last_seat: u64,
    /// Whether its process is over: its number may be somebody else's.
    reaped: bool,
    /// Whether its terminal was hung up.
    hung_up: bool,
    /// Whether nobody came back to it for so long that it no longer waits for anybody.
    abandoned: bool,
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
        let news = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| Refusal::io("cannot watch the command", &error.into()))?;
        let input = input.map(Input::start).transpose().map_err(no_thread)?;
        let command = Arc::new(Self {
            id,
            pid: child.id(),
            words: beginning_of(&request.command),
            detached: request.detached,
            input,
            terminal: terminal.map(|main| Mutex::new(Some(main))),
            news,
            shared: Mutex::new(Shared {
                spools: outputs.iter().map(|_| Spool::new(OUTPUT_WINDOW)).collect(),
                exited: None,
                seat: 0,
                last_seat: 0,
                reaped: false,
                hung_up: false,
                abandoned: false,
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

    /// The connection ended, and maybe the command goes on. Its terminal is hung up, as when a modem
    /// line drops. A command without one is waited for a while: its host may come back. Then its
    /// input ends, and like a detached one it keeps its newest output and runs on.
    pub(super) fn connection_lost(&self) {
        let shared = self.lock();
        if self.detached || shared.seat != 0 || shared.exited.is_some() {
            return;
        }
        if self.terminal.is_some() {
            drop(shared);
            return self.hang_up();
        }
        let waiting = |shared: &mut Shared| shared.seat == 0 && shared.exited.is_none();
        let waited = self
            .changed
            .wait_timeout_while(shared, ABANDONED_AFTER, waiting);
        let (mut shared, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            shared.abandoned = true;
            drop(shared);
            self.end_input();
            self.changed.notify_all();
        }
    }

    /// Hangs the terminal up: the session gets SIGHUP, and its input and output end.
    fn hang_up(&self) {
        let main = self.terminal.as_ref().and_then(take);
        if let Some(foreground) = main.and_then(|main| tcgetpgrp(main).ok()) {
            hang_up_group(foreground);
        }
        let mut shared = self.lock();
        if let (false, Some(leader)) = (shared.reaped, Pid::from_raw(self.pid as i32)) {
            hang_up_group(leader);
        }
        shared.hung_up = true;
        drop(shared);
        self.end_input();
        self.tell_readers();
        self.changed.notify_all();
    }

    fn tell_readers(&self) {
        // It can fail only where the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.news, &1_u64.to_ne_bytes());
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
        let terminal = self.terminal.as_ref();
        let terminal = terminal.map(|it| it.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(main) = terminal.as_ref().and_then(|it| it.as_ref()) {
            // A terminal whose command is gone does not mind.
            let _ = tcsetwinsize(main, winsize(size));
        }
    }

    /// Signals the process group, as long as its leader was not reaped; false where it was.
    pub(super) fn signal(&self, signal: i32) -> bool {
        let shared = self.lock();
        if !shared.reaped {
            self.signal_group(signal);
        }
        !shared.reaped
    }

    fn signal_group(&self, signal: i32) {
        // SAFETY: plain system call. The group is the command's own: its leader was not reaped.
        unsafe { libc::kill(-(self.pid as i32), signal) };
    }

    /// Takes an output until it ends, no faster than the host takes it. It ends, too, soon after
    /// the command, whatever holds it open; what the command itself wrote is taken in any case.
    fn read_output(&self, index: usize, mut output: File) {
        let mut chunk = vec![0; CHUNK.min(32 << 10)];
        let mut end: Option<OutputEnd> = None;
        let mut open = true;
        while open && !end.as_ref().is_some_and(OutputEnd::is_reached) {
            if !self.wait_output(&output, end.as_ref()) {
                match &mut end {
                    None if self.lock().hung_up => break,
                    None => end = Some(OutputEnd::of(&output)),
                    // Somebody else may have read it.
                    Some(end) => end.owed = 0,
                }
                continue;
            }
            // A terminal whose command is gone answers with an error: its end.
            let len = output.read(&mut chunk).unwrap_or(0);
            open = len > 0;
            if let Some(end) = &mut end {
                end.owed = end.owed.saturating_sub(len as u64);
            }
            self.pass_on(index, &chunk[..len]);
        }
        self.lock().spools[index].close();
        self.changed.notify_all();
        // A terminal goes away with its session. A pipe stays, so that what runs on in the
        // background does not end for writing into it.
        if self.terminal.is_none() {
            while open {
                open = output.read(&mut chunk).is_ok_and(|len| len > 0);
            }
        }
    }

    /// Waits for output; false where there is none, and either the command has ended or its time
    /// for output is over.
    fn wait_output(&self, output: &File, end: Option<&OutputEnd>) -> bool {
        let left = end.map(OutputEnd::left);
        let mut ready = vec![PollFd::new(output, PollFlags::IN)];
        if end.is_none() {
            ready.push(PollFd::new(&self.news, PollFlags::IN));
        }
        if poll(&mut ready, left.as_ref()).is_err() {
            // An interruption or a lack of memory: the read waits in its place.
            return true;
        }
        // News come first: output may come without end.
        let has_news = ready.get(1).is_some_and(|news| !news.revents().is_empty());
        !has_news && !ready[0].revents().is_empty()
    }

    fn pass_on(&self, index: usize, mut rest: &[u8]) {
        let mut shared = self.lock();
        while !rest.is_empty() && !shared.hung_up {
            if shared.seat == 0 && (self.detached || shared.abandoned) {
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

    /// Waits for the process, ending it when its time is up.
    fn wait_end(&self, mut child: Child, timeout: Option<Duration>) {
        let timed_out = timeout.is_some_and(|timeout| !self.ends_within(timeout));
        if timed_out {
            self.signal_group(libc::SIGKILL);
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
        self.tell_readers();
        self.changed.notify_all();
    }

    fn ends_within(&self, timeout: Duration) -> bool {
        let pid = Pid::from_raw(self.pid as i32);
        let Some(Ok(pidfd)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
            return true;
        };
        let limit = timespec(timeout);
        let mut ready = [PollFd::new(&pidfd, PollFlags::IN)];
        // An error here would be of no memory: then the command is left alone.
        !matches!(poll(&mut ready, Some(&limit)), Ok(0))
    }
}

/// When the output of a command that has ended is over.
struct OutputEnd {
    at: Instant,
    /// Bytes that were on their way when it ended: its own are among them.
    owed: u64,
}

impl OutputEnd {
    fn of(output: &File) -> Self {
        Self {
            at: Instant::now() + LINGER,
            owed: ioctl_fionread(output).unwrap_or(0),
        }
    }

    fn is_reached(&self) -> bool {
        self.owed == 0 && Instant::now() >= self.at
    }

    fn left(&self) -> Timespec {
        timespec(self.at.saturating_duration_since(Instant::now()))
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as i64,
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

fn take<T>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// What a group's terminal does when its line drops. One that is stopped runs again, to see it.
fn hang_up_group(group: Pid) {
    // A group that is gone needs nothing.
    let _ = kill_process_group(group, Signal::HUP);
    let _ = kill_process_group(group, Signal::CONT);
}

/// The first bytes of `words`, whole characters of them.
fn beginning_of(words: &[String]) -> Vec<String> {
    let mut left = WORDS_KEPT;
    let mut kept = Vec::new();
    for word in words {
        let word = &word[..word.floor_char_boundary(left)];
        left -= word.len();
        kept.push(word.to_owned());
        if left == 0 {
            break;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_long_commands_the_beginning_is_kept() {
        let words = ["echo".to_owned(), "ä".repeat(WORDS_KEPT), "x".to_owned()];
        let kept = beginning_of(&words);
        assert_eq!(kept[0], "echo");
        assert_eq!(kept[1], "ä".repeat(WORDS_KEPT / 2 - 2));
        assert_eq!(beginning_of(&words[..1]), words[..1]);
    }
}
