//! The serial console's other end: a log of limited size, and whoever is attached.
//!
//! The guest's output is gathered by [`ConsoleOutput`] on the vCPU that prints and handed out by
//! the [`ConsoleHub`] in the event loop a moment later, so that a byte costs the guest no system
//! call, and a line wakes the event loop once and not for each of its bytes. What
//! attached clients send is typed into the serial port as it takes it. Clients come and go on a
//! Unix stream socket that carries plain bytes both ways; one that reads too slowly misses output
//! and is told so.

mod client;
mod log;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clone_vmm::devices::serial::Serial;
use clone_vmm::event_loop::{EventHandler, Registrar};
use clone_vmm::timer::Timer;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use client::Client;
pub use log::ConsoleLog;

/// How long output is gathered: a guest prints byte by byte, and nobody sees what is later by this.
const GATHERING: Duration = Duration::from_millis(2);
/// Output that may wait for the event loop. Far above what comes while it does anything else.
const MAX_PENDING_OUTPUT: usize = 256 << 10;
/// Input that may wait for the guest; clients that send more wait.
const MAX_PENDING_INPUT: usize = 4 << 10;
/// Who may be attached at once.
const MAX_CLIENTS: usize = 16;
/// How much of the latest output one sees who attaches.
const REPLAY: u64 = 16 << 10;

const OUTPUT: u32 = 0;
const LISTENER: u32 = 1;
const DRAINED: u32 = 2;
const FIRST_CLIENT: u32 = 16;

/// Where input goes: the serial port, or a test.
pub trait ConsoleInput: Send {
    /// Takes some of `bytes`, and tells how many.
    fn input(&self, bytes: &[u8]) -> usize;
}

impl ConsoleInput for Arc<Serial> {
    fn input(&self, bytes: &[u8]) -> usize {
        Serial::input(self, bytes)
    }
}

#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    lost: u64,
}

/// The end that the serial port writes to; never blocks.
pub struct ConsoleOutput {
    // Held for a copy of bytes only: by the vCPU that prints and by the hub.
    pending: Arc<Mutex<Pending>>,
    gathered: Arc<Timer>,
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.bytes.len() + bytes.len() > MAX_PENDING_OUTPUT {
            pending.lost += bytes.len() as u64;
            return Ok(bytes.len());
        }
        let first = pending.bytes.is_empty();
        pending.bytes.extend_from_slice(bytes);
        drop(pending);
        if first {
            self.gathered.arm_once(GATHERING)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The hub, a handler in the event loop.
pub struct ConsoleHub {
    registrar: Registrar,
    listener: UnixListener,
    pending: Arc<Mutex<Pending>>,
    gathered: Arc<Timer>,
    log: Option<ConsoleLog>,
    port: Option<(Box<dyn ConsoleInput>, EventFd)>,
    typed: VecDeque<u8>,
    clients: Vec<Option<Client>>,
    attached: Arc<AtomicU32>,
}

impl ConsoleHub {
    /// A hub that waits in `registrar`'s slot for clients of `listener` (non-blocking), and the
    /// end for the serial port.
    pub fn new(
        registrar: Registrar,
        listener: UnixListener,
        log: Option<ConsoleLog>,
    ) -> io::Result<(Self, ConsoleOutput)> {
        let gathered = Arc::new(Timer::new()?);
        registrar.add(gathered.as_ref(), OUTPUT, EventSet::IN)?;
        registrar.add(&listener, LISTENER, EventSet::IN)?;
        let pending = Arc::new(Mutex::new(Pending::default()));
        let output = ConsoleOutput {
            pending: Arc::clone(&pending),
            gathered: Arc::clone(&gathered),
        };
        let hub = Self {
            registrar,
            listener,
            pending,
            gathered,
            log,
            port: None,
            typed: VecDeque::new(),
            clients: Vec::new(),
            attached: Arc::new(AtomicU32::new(0)),
        };
        Ok((hub, output))
    }

    /// Connects the port that input goes to; `drained` is written when it has taken all.
    pub fn connect(&mut self, port: Box<dyn ConsoleInput>, drained: EventFd) -> io::Result<()> {
        self.registrar.add(&drained, DRAINED, EventSet::IN)?;
        self.port = Some((port, drained));
        self.type_pending();
        Ok(())
    }

    /// How many are attached, for others to read.
    pub fn attached(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.attached)
    }

    /// Hands out what the guest has printed since.
    pub fn flush(&mut self) {
        let Pending { bytes, lost } = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *pending)
        };
        self.hand_out(&bytes);
        if lost > 0 {
            self.hand_out(format!("\r\n[clone: {lost} bytes of output lost]\r\n").as_bytes());
        }
        // Give the room back, so that the next lines need no new memory; but no more than that.
        let mut bytes = bytes;
        if bytes.capacity() <= 4096 {
            bytes.clear();
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if pending.bytes.capacity() == 0 {
                pending.bytes = bytes;
            }
        }
    }

    fn hand_out(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if let Some(log) = &mut self.log
            && let Err(error) = log.append(bytes)
        {
            // Once: a full file system would otherwise be told with each line.
            tracing::error!(%error, "the console's log ends here");
            self.log = None;
        }
        for index in 0..self.clients.len() {
            self.with_client(index, |client| client.send(bytes));
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let free = self.clients.iter().position(Option::is_none);
            let index = free.unwrap_or(self.clients.len());
            if index >= MAX_CLIENTS {
                tracing::warn!("a client of the console was turned away: {MAX_CLIENTS} are there");
                continue;
            }
            if let Err(error) = self.welcome(index, stream) {
                tracing::warn!(%error, "a client of the console could not be attached");
            }
        }
    }

    fn welcome(&mut self, index: usize, stream: std::os::unix::net::UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let interest = self.interest();
        self.registrar
            .add(&stream, FIRST_CLIENT + index as u32, interest)?;
        let client = Client::new(stream, interest);
        if index == self.clients.len() {
            self.clients.push(Some(client));
        } else {
            self.clients[index] = Some(client);
        }
        self.attached.fetch_add(1, Ordering::Relaxed);
        if let Some(log) = &self.log {
            let latest = log.latest(REPLAY)?;
            self.with_client(index, |client| client.send(&latest));
        }
        Ok(())
    }

    /// What clients are watched for beside room for output.
    fn interest(&self) -> EventSet {
        if self.typed.len() < MAX_PENDING_INPUT {
            EventSet::IN
        } else {
            EventSet::empty()
        }
    }

    /// Does something with a client; one that is gone is let go.
    fn with_client(&mut self, index: usize, act: impl FnOnce(&mut Client) -> io::Result<()>) {
        let input = self.interest();
        let Some(Some(client)) = self.clients.get_mut(index) else {
            return;
        };
        let token = FIRST_CLIENT + index as u32;
        let alive = act(client).and_then(|()| client.watch(&self.registrar, token, input));
        if alive.is_err() {
            // Gone in the ordinary way or by a fault of its own: the VM does not care which.
            let _ = self.registrar.remove(client.stream());
            self.clients[index] = None;
            self.attached.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn read_client(&mut self, index: usize) {
        let room = MAX_PENDING_INPUT.saturating_sub(self.typed.len());
        let mut typed = std::mem::take(&mut self.typed);
        self.with_client(index, |client| client.read(&mut typed, room));
        // Nobody else types meanwhile: the hub has one thread.
        self.typed = typed;
        self.type_pending();
    }

    /// Types what waits, as much as the port takes.
    fn type_pending(&mut self) {
        let Some((port, _)) = &self.port else { return };
        let was_full = self.typed.len() >= MAX_PENDING_INPUT;
        while !self.typed.is_empty() {
            let (head, _) = self.typed.as_slices();
            match port.input(head) {
                0 => break,
                taken => drop(self.typed.drain(..taken)),
            }
        }
        if self.typed.len() >= MAX_PENDING_INPUT || was_full {
            for index in 0..self.clients.len() {
                self.with_client(index, |_| Ok(()));
            }
        }
    }
}

impl EventHandler for ConsoleHub {
    fn handle_event(&mut self, token: u32, ready: EventSet) {
        match token {
            OUTPUT => {
                // Not due any more: somebody flushed in between.
                let _ = self.gathered.take();
                self.flush();
            }
            LISTENER => self.accept(),
            DRAINED => {
                if let Some((_, drained)) = &self.port {
                    // EAGAIN: a spurious event.
                    let _ = drained.read();
                }
                self.type_pending();
            }
            client => {
                let index = client.saturating_sub(FIRST_CLIENT) as usize;
                if ready.contains(EventSet::OUT) {
                    self.with_client(index, Client::flush);
                }
                let gone = ready.intersects(EventSet::HANG_UP | EventSet::ERROR);
                if gone && self.typed.len() >= MAX_PENDING_INPUT {
                    // It cannot be read from and would be reported for ever.
                    self.with_client(index, |_| Err(io::ErrorKind::UnexpectedEof.into()));
                } else if gone || ready.contains(EventSet::IN) {
                    self.read_client(index);
                }
            }
        }
    }
}
