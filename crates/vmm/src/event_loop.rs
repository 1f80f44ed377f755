//! The one event loop of a VM, which serves every device, the control socket and timers.
//!
//! A handler gets a slot in the loop and a [`Registrar`] for it, with which it adds, changes and
//! removes file descriptors from any thread (epoll allows it). Events carry the slot and a token
//! that the handler chose. The handler decides what an event means.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The most events that are taken from the kernel in one wait. It is large enough that a busy
/// device does not starve others.
const BATCH: usize = 32;

/// A handler of events of the loop.
pub trait EventHandler: Send {
    /// One of this handler's file descriptors is ready.
    ///
    /// `token` is the number it was registered with. Events may be spurious, because the descriptor
    /// may have been removed after the kernel reported it, so a handler must read without blocking.
    /// A file descriptor may be closed without [`Registrar::remove`] only where it has no
    /// duplicate.
    fn handle_event(&mut self, token: u32, ready: EventSet);
}

/// A handler, which the loop shares with the vCPU threads that reach the same device.
pub type SharedHandler = Arc<Mutex<dyn EventHandler>>;

/// The right to register file descriptors for one handler. Cheap to clone, usable on any thread.
#[derive(Clone)]
pub struct Registrar {
    epoll: Arc<Epoll>,
    slot: u32,
}

impl Registrar {
    /// Registers `fd`. Its events reach the handler with `token`.
    pub fn add(&self, fd: &impl AsRawFd, token: u32, interest: EventSet) -> io::Result<()> {
        self.ctl(ControlOperation::Add, fd, token, interest)
    }

    /// Changes the events that are waited for on a registered `fd`.
    pub fn modify(&self, fd: &impl AsRawFd, token: u32, interest: EventSet) -> io::Result<()> {
        self.ctl(ControlOperation::Modify, fd, token, interest)
    }

    /// Unregisters `fd`.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.ctl(ControlOperation::Delete, fd, 0, EventSet::empty())
    }

    fn ctl(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        token: u32,
        interest: EventSet,
    ) -> io::Result<()> {
        let data = u64::from(self.slot) << 32 | u64::from(token);
        self.epoll
            .ctl(operation, fd.as_raw_fd(), EpollEvent::new(interest, data))
    }
}

/// The event loop, which runs on the VM's main thread.
pub struct EventLoop {
    epoll: Arc<Epoll>,
    handlers: Vec<Option<SharedHandler>>,
}

impl EventLoop {
    /// An empty loop.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Arc::new(Epoll::new()?),
            handlers: Vec::new(),
        })
    }

    /// Reserves a slot. Its registrar may be used at once, because a device needs it to be built;
    /// the handler follows by [`EventLoop::attach`].
    pub fn reserve(&mut self) -> Registrar {
        let slot = self.handlers.len() as u32;
        self.handlers.push(None);
        Registrar {
            epoll: Arc::clone(&self.epoll),
            slot,
        }
    }

    /// Puts the handler into the slot that `registrar` was reserved for.
    pub fn attach(&mut self, registrar: &Registrar, handler: SharedHandler) {
        self.handlers[registrar.slot as usize] = Some(handler);
    }

    /// Removes the handler from its slot. Events that the kernel has reported already are dropped.
    pub fn detach(&mut self, registrar: &Registrar) {
        self.handlers[registrar.slot as usize] = None;
    }

    /// Waits for events once (for ever with a `timeout_ms` of -1) and passes them to their
    /// handlers.
    ///
    /// Returns the number of events. An interruption by a signal counts as none.
    pub fn run_once(&mut self, timeout_ms: i32) -> io::Result<usize> {
        let mut events = [EpollEvent::default(); BATCH];
        let ready = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..ready] {
            let slot = (event.data() >> 32) as usize;
            let token = event.data() as u32;
            let Some(Some(handler)) = self.handlers.get(slot) else {
                continue;
            };
            // A poisoned lock means that a device panicked in another thread. Its state is suspect,
            // but the handler must still run so that the VM can be stopped in order.
            let mut handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
            handler.handle_event(token, event.event_set());
        }
        Ok(ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    struct Recorder {
        fd: EventFd,
        seen: Vec<u32>,
    }

    impl EventHandler for Recorder {
        fn handle_event(&mut self, token: u32, _ready: EventSet) {
            self.fd.read().unwrap();
            self.seen.push(token);
        }
    }

    #[test]
    fn events_reach_the_handler_of_their_slot_with_their_token() {
        let mut events = EventLoop::new().unwrap();
        let mut handlers = Vec::new();
        for token in [7, 9] {
            let registrar = events.reserve();
            let fd = EventFd::new(EFD_NONBLOCK).unwrap();
            registrar.add(&fd, token, EventSet::IN).unwrap();
            let handler = Arc::new(Mutex::new(Recorder {
                fd,
                seen: Vec::new(),
            }));
            events.attach(&registrar, handler.clone());
            handlers.push(handler);
        }
        assert_eq!(events.run_once(0).unwrap(), 0);
        handlers[1].lock().unwrap().fd.write(1).unwrap();
        assert_eq!(events.run_once(0).unwrap(), 1);
        assert!(handlers[0].lock().unwrap().seen.is_empty());
        assert_eq!(handlers[1].lock().unwrap().seen, [9]);
    }

    #[test]
    fn a_detached_handler_hears_nothing() {
        let mut events = EventLoop::new().unwrap();
        let registrar = events.reserve();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        registrar.add(&fd, 1, EventSet::IN).unwrap();
        fd.write(1).unwrap();
        let handler = Arc::new(Mutex::new(Recorder {
            fd,
            seen: Vec::new(),
        }));
        events.attach(&registrar, handler.clone());
        events.detach(&registrar);
        events.run_once(0).unwrap();
        assert!(handler.lock().unwrap().seen.is_empty());
    }
}
