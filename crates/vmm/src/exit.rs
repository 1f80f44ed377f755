//! The reason for which a machine ended, sent from any thread to the event loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The reason for which a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset. The caller may honour this by calling
    /// [`PausedMachine::reset`](crate::machine::PausedMachine::reset).
    Reboot,
    /// The guest cannot run any more, for the given reason: after a triple fault, for example.
    Crash(String),
    /// The caller ended the machine.
    Killed,
}

/// Holds the first reason to end that is sent; any other reason replaces a reboot. Clones are cheap
/// and share the reason.
#[derive(Clone)]
pub struct ExitSignal(Arc<Inner>);

struct Inner {
    reason: Mutex<Option<Exit>>,
    fd: EventFd,
}

impl ExitSignal {
    /// A signal without a reason.
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Inner {
            reason: Mutex::new(None),
            fd,
        })))
    }

    /// Ends the machine. Only the first reason counts, except that a machine which waits for its
    /// reboot can still be ended.
    pub fn send(&self, reason: Exit) {
        let mut slot = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*slot, None | Some(Exit::Reboot)) {
            *slot = Some(reason);
        }
        drop(slot);
        self.notify();
    }

    /// Makes the eventfd readable again if there is a reason, so that the event loop looks at it
    /// again.
    pub fn notify(&self) {
        if self.get().is_some() {
            // The counter cannot overflow in the life of a machine, and the eventfd is readable in
            // any case.
            let _ = self.0.fd.write(1);
        }
    }

    /// Drains the eventfd without clearing the reason. It is readable again after the next reason
    /// or [`ExitSignal::notify`].
    pub fn drain(&self) {
        // EAGAIN means that there was nothing to drain.
        let _ = self.0.fd.read();
    }

    /// The reason, or `None` while the machine has not ended.
    pub fn get(&self) -> Option<Exit> {
        self.0
            .reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Clears the request for a reboot, for a machine whose guest is another than the one that asked
    /// for it. Any other reason stays.
    pub fn clear_reboot(&self) {
        let mut slot = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if *slot == Some(Exit::Reboot) {
            *slot = None;
            self.drain();
        }
    }

    /// Clears the reason, for a machine that starts again.
    pub fn clear(&self) {
        *self.0.reason.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.drain();
    }
}

/// The eventfd, which is readable once there is a reason.
impl AsRawFd for ExitSignal {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}
