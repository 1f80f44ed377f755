//! A command's input: received from the host without blocking, and written as the command reads.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use agent_proto::INPUT_WINDOW;
use agent_proto::messages::from_agent;

use crate::conversation::{Outbox, STACK_BYTES};

/// The input of a command.
pub(super) struct Input {
    /// The queue of received input; `None` after its end.
    queue: Mutex<Option<Sender<Vec<u8>>>>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The number of bytes that were received since the start.
    received: u64,
    /// The number of those that were written.
    taken: u64,
    /// The host that gets an acknowledgement of the bytes that were written.
    host: Option<Outbox>,
}

/// The host sent more than its window allows.
pub(super) struct Overrun;

impl Input {
    /// Feeds `file`, the writing end of the command's input, on a thread of its own.
    pub(super) fn start(file: File) -> std::io::Result<Self> {
        let (sender, receiver) = channel();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        thread::Builder::new()
            .name("input".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || feed(file, &receiver, &shared))?;
        Ok(Self {
            queue: Mutex::new(Some(sender)),
            state,
        })
    }

    /// Sends acknowledgements of the bytes that are written to another host from now on. Returns how many bytes were received
    /// and written before.
    pub(super) fn attach(&self, host: &Outbox) -> (u64, u64) {
        let mut state = lock(&self.state);
        state.host = Some(host.clone());
        (state.received, state.taken)
    }

    pub(super) fn push(&self, data: Vec<u8>) -> Result<(), Overrun> {
        let mut state = lock(&self.state);
        let under_way = state.received - state.taken;
        if under_way + data.len() as u64 > INPUT_WINDOW as u64 {
            return Err(Overrun);
        }
        state.received += data.len() as u64;
        drop(state);
        if let Some(queue) = &*self.queue.lock().unwrap_or_else(PoisonError::into_inner) {
            // A command may close its input, and then reads nothing more.
            let _ = queue.send(data);
        }
        Ok(())
    }

    /// Ends the input: the command sees the end after it has read everything that was sent.
    pub(super) fn end(&self) {
        *self.queue.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn feed(mut file: File, pieces: &Receiver<Vec<u8>>, shared: &Mutex<State>) {
    let mut open = true;
    for data in pieces {
        // Input that is sent after the command has closed it counts as read, so that the host does
        // not wait forever.
        open = open && file.write_all(&data).is_ok();
        let mut state = lock(shared);
        state.taken += data.len() as u64;
        let (taken, host) = (state.taken, state.host.clone());
        drop(state);
        if let Some(host) = host {
            // A host that has gone away learns it from the next connection.
            let _ = host.send(from_agent::Kind::InputTaken(taken));
        }
    }
}
