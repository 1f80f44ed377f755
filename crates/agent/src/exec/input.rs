//! A command's input: received from the host without blocking, and written as the command reads.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use agent_proto::INPUT_WINDOW;
use agent_proto::messages::from_agent;

use crate::conversation::{Outbox, STACK_BYTES};

/// The input of a command.
pub(super) struct Input {
    /// The queue of received input; `None` after its end.
    queue: Mutex<Option<Sender<Piece>>>,
    under_way: Arc<Mutex<u64>>,
}

struct Piece {
    data: Vec<u8>,
    /// Called with the number of bytes that were written.
    host: Outbox,
}

/// The host sent more than its window allows.
pub(super) struct Overrun;

impl Input {
    /// Feeds `file`, the writing end of the command's input, on a thread of its own.
    pub(super) fn start(file: File) -> std::io::Result<Self> {
        let (sender, receiver) = channel();
        let under_way = Arc::new(Mutex::new(0));
        let counter = Arc::clone(&under_way);
        thread::Builder::new()
            .name("input".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || feed(file, &receiver, &counter))?;
        Ok(Self {
            queue: Mutex::new(Some(sender)),
            under_way,
        })
    }

    pub(super) fn push(&self, data: Vec<u8>, host: &Outbox) -> Result<(), Overrun> {
        let mut under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *under_way + data.len() as u64 > INPUT_WINDOW as u64 {
            return Err(Overrun);
        }
        *under_way += data.len() as u64;
        drop(under_way);
        if let Some(queue) = &*self.queue.lock().unwrap_or_else(PoisonError::into_inner) {
            // A command may close its input, and then reads nothing more.
            let _ = queue.send(Piece {
                data,
                host: host.clone(),
            });
        }
        Ok(())
    }

    /// Ends the input: the command sees the end after it has read everything that was sent.
    pub(super) fn end(&self) {
        *self.queue.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn feed(mut file: File, pieces: &Receiver<Piece>, under_way: &Mutex<u64>) {
    let mut taken = 0;
    let mut open = true;
    for Piece { data, host } in pieces {
        // Input that is sent after the command has closed it counts as read, so that the host does
        // not wait forever.
        open = open && file.write_all(&data).is_ok();
        taken += data.len() as u64;
        *under_way.lock().unwrap_or_else(PoisonError::into_inner) -= data.len() as u64;
        // The next connection starts with a full window.
        let _ = host.send(from_agent::Kind::InputTaken(taken));
    }
}
