//! Why a machine ended, told from any thread to the event loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset. The caller may honour this by calling
    /// [`PausedMachine::reset`](super::PausedMachine::reset).
    Reboot,
    /// The guest can not go on: a triple fault, say. In words.
    Crash(String),
    /// We ended it.
    Killed,
}

/// Where the first reason to end is kept; a wish to reboot gives way to any other. Cheap to clone.
#[derive(Clone)]
pub struct ExitSignal(Arc<Inner>);

struct Inner {
    reason: Mutex<Option<Exit>>,
    fd: EventFd,
}

impl ExitSignal {
    /// A signal that nobody has sent yet.
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Inner {
            reason: Mutex::new(None),
            fd,
        })))
    }

    /// Ends the machine. Only the first reason counts, but who asked for a reboot can still be
    /// ended.
    pub fn send(&self, reason: Exit) {
        let mut slot = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*slot, None | Some(Exit::Reboot)) {
            *slot = Some(reason);
        }
        drop(slot);
        self.notify();
    }

    /// Has whoever waits look again at the reason, if there is one.
    pub fn notify(&self) {
        if self.get().is_some() {
            // The counter cannot overflow in the life of a machine; readable it is in any case.
            let _ = self.0.fd.write(1);
        }
    }

    /// Takes the news, not the reason: readable again at the next one, or when woken.
    pub fn drain(&self) {
        // EAGAIN: there was no news.
        let _ = self.0.fd.read();
    }

    /// The reason, once there is one.
    pub fn get(&self) -> Option<Exit> {
        self.0
            .reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Forgets the reason, for a machine that starts again.
    pub fn clear(&self) {
        *self.0.reason.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.drain();
    }
}

/// Readable once there is a reason.
impl AsRawFd for ExitSignal {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}
