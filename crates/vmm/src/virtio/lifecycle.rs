//! The states of a device's life, which the transport alone owns: idle, running or paused.
//!
//! Everything that the transport does with a device's life goes through [`Lifecycle`], so a device
//! needs no flag of its own: it is never called while it is idle or paused, but to be activated,
//! resumed, reset or saved.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::epoll::EventSet;

use super::{Activation, DeviceError, VirtioDevice};

/// Whether a device is running. Read by devices that the control socket reaches past the
/// transport; written by the transport alone.
#[derive(Clone, Debug, Default)]
pub struct RunState(Arc<AtomicBool>);

impl RunState {
    /// Whether the device may use its queues, RAM and interrupts now.
    pub fn is_running(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The state of a device's life.
#[derive(Debug)]
enum State {
    /// No driver has set the device up, or the device is broken until the driver resets it.
    Idle,
    /// The device serves its driver.
    Running,
    /// The device is at rest.
    Paused {
        /// The events of the device's own descriptors that came meanwhile, by token. An
        /// edge-triggered descriptor reports an event only once.
        events: BTreeMap<u32, EventSet>,
    },
}

/// The life of one device, from the transport's side.
#[derive(Debug)]
pub struct Lifecycle {
    state: State,
    run_state: RunState,
}

impl Lifecycle {
    /// The life of a new device.
    pub fn new() -> Self {
        Self {
            state: State::Idle,
            run_state: RunState::default(),
        }
    }

    /// For the device's [`Activation`].
    pub fn run_state(&self) -> RunState {
        self.run_state.clone()
    }

    /// Whether the device is running.
    pub fn is_running(&self) -> bool {
        matches!(self.state, State::Running)
    }

    /// Whether no driver uses the device.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    fn set(&mut self, state: State) {
        let is_running = matches!(state, State::Running);
        self.run_state.0.store(is_running, Ordering::Release);
        self.state = state;
    }

    /// Activates an idle device.
    ///
    /// # Errors
    /// The device's. It must be reset then.
    pub fn activate(
        &mut self,
        device: &mut dyn VirtioDevice,
        activation: Activation,
    ) -> Result<(), DeviceError> {
        self.set(State::Running);
        device.activate(activation)
    }

    /// Resets the device, whatever it is doing.
    pub fn reset(&mut self, device: &mut dyn VirtioDevice) {
        self.set(State::Idle);
        device.reset();
    }

    /// Pauses a running device.
    ///
    /// # Errors
    /// The device's. It must be reset then.
    pub fn pause(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DeviceError> {
        if self.is_running() {
            let events = BTreeMap::new();
            self.set(State::Paused { events });
            device.pause()?;
        }
        Ok(())
    }

    /// Resumes a paused device, and hands it the events that came meanwhile.
    ///
    /// # Errors
    /// The device's. It must be reset then.
    pub fn resume(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DeviceError> {
        let State::Paused { events } = &mut self.state else {
            return Ok(());
        };
        let mut events = std::mem::take(events);
        self.set(State::Running);
        device.resume()?;
        // Listeners have low tokens: what they accept must not take an event of a connection that
        // has ended meanwhile.
        while let Some((token, ready)) = events.pop_last() {
            device.handle_event(token, ready)?;
        }
        Ok(())
    }

    /// The driver notified the device of `queue`. This is ignored while the device is paused,
    /// because it looks at every queue when it is resumed.
    ///
    /// # Errors
    /// The device's. It must be reset then.
    pub fn notify_queue(
        &mut self,
        device: &mut dyn VirtioDevice,
        queue: u16,
    ) -> Result<(), DeviceError> {
        match self.state {
            State::Running => device.notify_queue(queue),
            State::Idle | State::Paused { .. } => Ok(()),
        }
    }

    /// A descriptor of the device is ready. The event is kept while the device is paused.
    ///
    /// # Errors
    /// The device's. It must be reset then.
    pub fn handle_event(
        &mut self,
        device: &mut dyn VirtioDevice,
        token: u32,
        ready: EventSet,
    ) -> Result<(), DeviceError> {
        match &mut self.state {
            State::Running => device.handle_event(token, ready),
            State::Paused { events } => {
                *events.entry(token).or_insert(EventSet::empty()) |= ready;
                Ok(())
            }
            State::Idle => Ok(()),
        }
    }
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self::new()
    }
}
