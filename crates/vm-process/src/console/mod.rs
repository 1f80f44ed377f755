//! The host side of the serial console: a log of limited size, and the attached clients.
//!
//! The vCPU that prints gathers output in [`ConsoleOutput`], and the [`ConsoleHub`] in the event
//! loop passes it on a moment later. So a byte costs the guest no system call, and a line wakes the
//! event loop once and not for each of its bytes. The input of attached clients is sent to the
//! serial port as fast as the port accepts it. Clients connect to a Unix stream socket that carries
//! plain bytes in both directions; one that reads too slowly misses output and receives a notice of
//! that.

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

/// The time for which output is gathered. A guest prints byte by byte, and a delay this short is
/// not noticed.
const GATHERING: Duration = Duration::from_millis(2);
/// The most bytes of output that may wait for the event loop, far more than a guest prints while
/// the loop serves another handler.
const MAX_PENDING_OUTPUT: usize = 256 << 10;
/// The most bytes of input that may wait for the guest; beyond that, clients wait.
const MAX_PENDING_INPUT: usize = 4 << 10;
/// The most clients attached at once.
const MAX_CLIENTS: usize = 16;
/// The amount of recent output that a new client receives, in bytes.
const REPLAY: u64 = 16 << 10;

const OUTPUT: u32 = 0;
const LISTENER: u32 = 1;
const DRAINED: u32 = 2;
const FIRST_CLIENT: u32 = 16;

/// The receiver of input: the serial port, or a test.
pub trait ConsoleInput: Send {
    /// Accepts some of `bytes`, and returns how many.
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

/// The writer for the serial port's output; it never blocks.
pub struct ConsoleOutput {
    // The vCPU that prints and the hub hold this lock only to copy bytes.
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
    /// Makes a hub that accepts clients of `listener`, which must be non-blocking, in `registrar`'s
    /// slot, and the writer for the serial port.
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

    /// Connects the port that receives input. The port signals `drained` when it has sent all its
    /// input to the guest.
    pub fn connect(&mut self, port: Box<dyn ConsoleInput>, drained: EventFd) -> io::Result<()> {
        self.registrar.add(&drained, DRAINED, EventSet::IN)?;
        self.port = Some((port, drained));
        self.type_pending();
        Ok(())
    }

    /// The number of attached clients, shared with readers outside of the hub.
    pub fn attached(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.attached)
    }

    /// Writes the gathered output to the log and to all clients.
    pub fn flush(&mut self) {
        let Pending { bytes, lost } = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *pending)
        };
        self.hand_out(&bytes);
        if lost > 0 {
            self.hand_out(format!("\r\n[clone: {lost} bytes of output lost]\r\n").as_bytes());
        }
        // The buffer is returned, so that the next lines need no allocation, but not if it has
        // grown large.
        let mut bytes = bytes;
        if bytes.capacity() <= 4096 {
            bytes.clear();
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if pending.bytes.capacity() == 0 {
                pending.bytes = bytes;
            }
        }
    }

    /// Tells the attached clients, and the log, what happened to the VM.
    pub fn announce(&mut self, text: &str) {
        self.flush();
        // Input that was typed for the former guest is not for this one.
        self.typed.clear();
        self.hand_out(format!("\r\n[clone: {text}]\r\n").as_bytes());
    }

    fn hand_out(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if let Some(log) = &mut self.log
            && let Err(error) = log.append(bytes)
        {
            // The log stops at the first error; otherwise a full file system would be reported with
            // each line.
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

    /// The events that clients are registered for besides writing.
    fn interest(&self) -> EventSet {
        if self.typed.len() < MAX_PENDING_INPUT {
            EventSet::IN
        } else {
            EventSet::empty()
        }
    }

    /// Applies `act` to a client, and disconnects the client if that fails.
    fn with_client(&mut self, index: usize, act: impl FnOnce(&mut Client) -> io::Result<()>) {
        let input = self.interest();
        let Some(Some(client)) = self.clients.get_mut(index) else {
            return;
        };
        let token = FIRST_CLIENT + index as u32;
        let alive = act(client).and_then(|()| client.watch(&self.registrar, token, input));
        if alive.is_err() {
            // A client that closed and one that failed are treated alike.
            let _ = self.registrar.remove(client.stream());
            self.clients[index] = None;
            self.attached.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn read_client(&mut self, index: usize) {
        let room = MAX_PENDING_INPUT.saturating_sub(self.typed.len());
        let mut typed = std::mem::take(&mut self.typed);
        self.with_client(index, |client| client.read(&mut typed, room));
        // Nothing else adds input meanwhile, since the hub runs on one thread.
        self.typed = typed;
        self.type_pending();
    }

    /// Sends waiting input to the port, as much as it accepts.
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
                // The read fails if a flush has already drained the eventfd.
                let _ = self.gathered.take();
                self.flush();
            }
            LISTENER => self.accept(),
            DRAINED => {
                if let Some((_, drained)) = &self.port {
                    // The read fails with EAGAIN at a spurious event.
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
                    // A client that hung up is reported at every wait. While no more input is
                    // accepted it cannot be read to its end, so it is disconnected.
                    self.with_client(index, |_| Err(io::ErrorKind::UnexpectedEof.into()));
                } else if gone || ready.contains(EventSet::IN) {
                    self.read_client(index);
                }
            }
        }
    }
}
