//! A command, from its start until a host has seen its end.
//!
//! Each command has one thread per output that fills the spools, one that waits for the process,
//! and one that feeds its input. They and the sessions share [`Shared`] under one lock, which is
//! never held across a system call that can block.

mod observe;

use std::collections::BTreeSet;
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

/// The time after a command's end in which output of its background processes is still collected.
const LINGER: Duration = Duration::from_millis(500);
/// The time that a command waits for its host to reconnect.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);
/// The number of bytes of a command's arguments that are kept for lists of commands.
const WORDS_KEPT: usize = 4 << 10;

/// The next event that a session passes on.
pub(super) enum Piece {
    Output {
        stream: Stream,
        cursor: u64,
        data: Vec<u8>,
    },
    /// The process ended and all output was sent.
    Exited(Exited),
    /// The session is no longer attached, or does not observe any more.
    Replaced,
}

/// See the module.
pub(crate) struct Command {
    pub(super) id: u64,
    pub(super) pid: u32,
    pub(super) words: Vec<String>,
    detached: bool,
    /// How long it is kept after a host has seen its end.
    keep: Duration,
    input: Option<Input>,
    /// The host's side of the terminal, until that is hung up. The lock is held only for a moment.
    terminal: Option<Mutex<Option<OwnedFd>>>,
    /// An eventfd that is readable after the command has ended or its terminal was hung up. The
    /// threads that wait for output poll it.
    news: OwnedFd,
    shared: Mutex<Shared>,
    changed: Condvar,
}

struct Shared {
    spools: Vec<Spool>,
    exited: Option<Exited>,
    /// The number of the attached session; 0 means none. Numbers are not reused.
    seat: u64,
    /// The numbers of the sessions that read beside it.
    observers: BTreeSet<u64>,
    last_seat: u64,
    /// When a host first saw the end.
    seen: Option<Instant>,
    /// Whether the process was reaped, so that its id may belong to another process.
    reaped: bool,
    /// Whether the terminal was hung up.
    hung_up: bool,
    /// Whether no host reconnected in time, so that the command no longer waits for one.
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
        let new_spool = || match request.keep_ms {
            0 => Spool::new(OUTPUT_WINDOW),
            _ => Spool::keeping(OUTPUT_WINDOW),
        };
        let command = Arc::new(Self {
            id,
            pid: child.id(),
            words: beginning_of(&request.command),
            detached: request.detached,
            keep: Duration::from_millis(request.keep_ms),
            input,
            terminal: terminal.map(|main| Mutex::new(Some(main))),
            news,
            shared: Mutex::new(Shared {
                spools: outputs.iter().map(|_| new_spool()).collect(),
                exited: None,
                seat: 0,
                observers: BTreeSet::new(),
                last_seat: 0,
                seen: None,
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

    /// The first message to a host that attaches. Acknowledgements of input go to that host from now on.
    pub(super) fn started(&self, host: &Outbox) -> Started {
        let input = self.input.as_ref().map(|input| input.attach(host));
        let (input_received, input_taken) = input.unwrap_or_default();
        Started {
            id: self.id,
            pid: self.pid,
            input_received,
            input_taken,
        }
    }

    /// Notes that a host has seen the end. Returns whether the command is kept.
    pub(super) fn mark_seen(&self) -> bool {
        self.lock().seen.get_or_insert_with(Instant::now);
        !self.keep.is_zero()
    }

    /// Whether a host has seen the end.
    pub(super) fn is_seen(&self) -> bool {
        self.lock().seen.is_some()
    }

    /// Whether a host has seen the end so long ago that the command is not kept any more.
    pub(super) fn is_over(&self) -> bool {
        let seen = self.lock().seen;
        seen.is_some_and(|seen| seen.elapsed() >= self.keep)
    }

    pub(super) fn exited(&self) -> Option<Exited> {
        self.lock().exited
    }

    pub(super) fn is_attached(&self) -> bool {
        self.lock().seat != 0
    }

    /// Attaches a session, replacing one that may not know yet that its connection is lost.
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

    /// Handles the end of the connection while the command may still run. A terminal is hung up, as
    /// when a modem line drops. A command without one waits for its host to reconnect. After that
    /// time its input ends, and like a detached command it keeps its newest output and continues to
    /// run.
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

    /// Hangs the terminal up: the session's processes get SIGHUP, and the command's input and
    /// output end.
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
        // The write fails only if the counter is full, and then the eventfd is readable.
        let _ = rustix::io::write(&self.news, &1_u64.to_ne_bytes());
    }

    /// Waits for the next event.
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

    pub(super) fn feed(&self, data: Vec<u8>) -> Result<(), Overrun> {
        self.input.as_ref().map_or(Ok(()), |input| input.push(data))
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
            // Setting the size of a terminal whose command has ended has no effect.
            let _ = tcsetwinsize(main, winsize(size));
        }
    }

    /// Signals the process group; returns false if its leader was reaped, so that the id may be
    /// reused.
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

    /// Reads an output until it ends, at most as fast as the host reads it. Reading also stops soon
    /// after the command has ended, even if another process keeps the output open; everything that
    /// the command itself wrote is read.
    fn read_output(&self, index: usize, mut output: File) {
        let mut chunk = vec![0; CHUNK.min(32 << 10)];
        let mut end: Option<OutputEnd> = None;
        let mut open = true;
        while open && !end.as_ref().is_some_and(OutputEnd::is_reached) {
            if !self.wait_output(&output, end.as_ref()) {
                match &mut end {
                    None if self.lock().hung_up => break,
                    None => end = Some(OutputEnd::of(&output)),
                    // Another reader may have read the bytes first.
                    Some(end) => end.owed = 0,
                }
                continue;
            }
            // A terminal whose command has ended returns an error, which counts as its end.
            let len = output.read(&mut chunk).unwrap_or(0);
            open = len > 0;
            if let Some(end) = &mut end {
                end.owed = end.owed.saturating_sub(len as u64);
            }
            self.pass_on(index, &chunk[..len]);
        }
        self.lock().spools[index].close();
        self.changed.notify_all();
        // A terminal ends with its session. A pipe stays open, so that background processes do not
        // die from writing into it.
        if self.terminal.is_none() {
            while open {
                open = output.read(&mut chunk).is_ok_and(|len| len > 0);
            }
        }
    }

    /// Waits for output; returns false if there is none, and the command or its time for output has
    /// ended.
    fn wait_output(&self, output: &File, end: Option<&OutputEnd>) -> bool {
        let left = end.map(OutputEnd::left);
        let mut ready = vec![PollFd::new(output, PollFlags::IN)];
        if end.is_none() {
            ready.push(PollFd::new(&self.news, PollFlags::IN));
        }
        if poll(&mut ready, left.as_ref()).is_err() {
            // After an interruption or a lack of memory, the read blocks instead.
            return true;
        }
        // Status changes take precedence, since output may never end.
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

    /// Waits for the process, and ends it when its time limit has passed.
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
        // The only possible error is a lack of memory; then the command continues.
        !matches!(poll(&mut ready, Some(&limit)), Ok(0))
    }
}

/// The point at which the output of an ended command is complete.
struct OutputEnd {
    at: Instant,
    /// The bytes that were in the pipe when the command ended, which include its own.
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

/// Sends the signals of a terminal's hang-up to the group. A stopped group is continued, so that it
/// receives them.
fn hang_up_group(group: Pid) {
    // A group that has ended needs no signal.
    let _ = kill_process_group(group, Signal::HUP);
    let _ = kill_process_group(group, Signal::CONT);
}

/// The first bytes of `words`, without cutting a character.
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
