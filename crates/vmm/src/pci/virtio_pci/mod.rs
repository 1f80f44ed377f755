//! Virtio over PCI: the transport between a guest's driver and a [`VirtioDevice`].
//!
//! One memory BAR holds everything: the common configuration, the device's own configuration, a
//! doorbell per queue (an ioeventfd, so a kick does not leave the kernel) and the MSI-X table.
//! There is no legacy interface and no INTx.
//!
//! Locks: the transport's own lock is taken by vCPU threads (registers) and by the event loop
//! (kicks, events); the device's lock is taken inside it, and by the control socket alone.
//!
//! Source: VIRTIO 1.3, section 4.1.

mod common;
mod interrupt;
mod layout;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::common::{CommonConfig, CommonState, Request};
use self::interrupt::PciInterrupt;
use super::config::ConfigState;
use super::msix::{MsixState, MsixTable};
use super::{BarRange, ConfigSpace, PciDevice};
use crate::event_loop::{EventHandler, Registrar};
use crate::irq::IrqRoutes;
use crate::virtio::{
    Activation, ActiveQueue, DeviceError, DeviceName, GuestRam, Interrupt, Lifecycle, SavedQueue,
    VirtioDevice,
};

/// The first token of kicks; the queue's index is added.
const KICK_TOKEN: u32 = 0x8000_0000;

/// A device, shared by its transport and by what controls it (to set the balloon's target, for
/// example).
pub type SharedVirtioDevice = Arc<Mutex<dyn VirtioDevice>>;

/// The saved state of a transport and of the device behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    device_type: u32,
    config: ConfigState,
    msix: MsixState,
    common: CommonState,
    /// The device's own state, as [`VirtioDevice::save`] encoded it.
    pub device: Vec<u8>,
}

impl VirtioPciState {
    /// The kind of device (VIRTIO 5) that was saved.
    pub fn device_type(&self) -> u32 {
        self.device_type
    }
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    name: DeviceName,
    config: ConfigSpace,
    /// The configuration space of the new device.
    power_on: ConfigState,
    layout: layout::Capabilities,
    msix: MsixTable,
    common: CommonConfig,
    interrupt: Arc<PciInterrupt>,
    kicks: Vec<EventFd>,
    /// The present address of the doorbells, which follow the BAR.
    doorbells_at: Option<u64>,
    irq_routes: Arc<dyn IrqRoutes>,
    device: SharedVirtioDevice,
    ram: GuestRam,
    events: Registrar,
    life: Lifecycle,
}

impl VirtioPci {
    /// Puts `device` behind a BAR at `bar_address` (guest-physical, aligned to
    /// [`VirtioPci::BAR_SIZE`]).
    pub fn new(
        device: SharedVirtioDevice,
        bar_address: u32,
        irq_routes: Arc<dyn IrqRoutes>,
        ram: GuestRam,
        events: Registrar,
    ) -> io::Result<Self> {
        let (name, device_type, features, sizes) = {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            (
                device.name(),
                device.device_type(),
                device.features(),
                device.queue_max_sizes(),
            )
        };
        let queues = sizes.len() as u16;
        // One vector for configuration changes and one for each queue.
        let msix = MsixTable::new(Arc::clone(&irq_routes), queues + 1)?;
        let (config, layout) =
            layout::configuration(device_type, bar_address, queues, msix.control());
        let kicks: Vec<EventFd> = sizes
            .iter()
            .map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        let interrupt = Arc::new(PciInterrupt::new(msix.eventfds()?, queues));
        let mut transport = Self {
            name,
            power_on: config.save(),
            config,
            layout,
            msix,
            common: CommonConfig::new(features, &sizes),
            interrupt,
            kicks,
            doorbells_at: None,
            irq_routes,
            device,
            ram,
            events,
            life: Lifecycle::new(),
        };
        transport.move_doorbells();
        Ok(transport)
    }

    /// The size of the one BAR in bytes.
    pub const BAR_SIZE: u32 = layout::BAR_SIZE;

    /// The device behind this transport.
    pub fn device(&self) -> SharedVirtioDevice {
        Arc::clone(&self.device)
    }

    /// The device's short name, for messages.
    pub fn name(&self) -> DeviceName {
        self.name
    }

    fn locked(device: &SharedVirtioDevice) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        // A panic inside a device leaves it suspect, but it can still be reset or dropped.
        device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the doorbells to the BAR's present address.
    fn move_doorbells(&mut self) {
        let now = self
            .config
            .bars()
            .first()
            .map(|bar| bar.address + layout::NOTIFY_OFFSET);
        if now == self.doorbells_at {
            return;
        }
        for (queue, kick) in (0u64..).zip(&self.kicks) {
            let offset = queue * layout::NOTIFY_STRIDE;
            let unregistered = self
                .doorbells_at
                .map(|at| self.irq_routes.unregister_ioeventfd(at + offset, kick));
            let registered = now.map(|at| self.irq_routes.register_ioeventfd(at + offset, kick));
            for result in [unregistered, registered].into_iter().flatten() {
                if let Err(error) = result {
                    tracing::warn!(device = %self.name, queue, %error, "a doorbell could not be moved");
                }
            }
        }
        self.doorbells_at = now;
    }

    /// Activates the device: its driver is ready, or was when the state was saved.
    fn activate(&mut self) {
        if let Err(error) = self.try_activate() {
            self.fail(&error);
        }
    }

    fn try_activate(&mut self) -> Result<(), DeviceError> {
        let queues = self.ready_queues()?;
        let indices: Vec<u16> = queues.iter().map(|queue| queue.index).collect();
        let activation = Activation {
            ram: self.ram.clone(),
            queues,
            features: self.common.agreed_features(),
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            run_state: self.life.run_state(),
            events: self.events.clone(),
        };
        let mut device = Self::locked(&self.device);
        self.life.activate(&mut *device, activation)?;
        for index in indices
            .into_iter()
            .filter(|&index| !device.in_kernel(index))
        {
            let kick = &self.kicks[usize::from(index)];
            let token = KICK_TOKEN + u32::from(index);
            self.events
                .add(kick, token, EventSet::IN)
                .map_err(|source| DeviceError::Host {
                    device: self.name,
                    action: "wait for a queue",
                    source,
                })?;
        }
        Ok(())
    }

    fn ready_queues(&self) -> Result<Vec<ActiveQueue>, DeviceError> {
        let ready = (0u16..)
            .zip(&self.common.queues)
            .filter(|(_, queue)| queue.saved.ready);
        ready
            .map(|(index, registers)| {
                let wrong = |source| DeviceError::Queue {
                    device: self.name,
                    queue: index,
                    source,
                };
                let queue = Queue::try_from(registers.saved).map_err(wrong)?;
                if !queue.is_valid(&self.ram) {
                    return Err(DeviceError::Driver {
                        device: self.name,
                        reason: format!("queue {index} does not lie within RAM"),
                    });
                }
                let kick = self.kicks[usize::from(index)]
                    .try_clone()
                    .map_err(|source| DeviceError::Host {
                        device: self.name,
                        action: "share a kick",
                        source,
                    })?;
                Ok(ActiveQueue { index, queue, kick })
            })
            .collect()
    }

    /// Marks the device as broken, which the guest is told so that it may reset the device. The VM
    /// runs on.
    fn fail(&mut self, error: &DeviceError) {
        tracing::warn!(device = %self.name, %error, "the device is broken until its driver resets it");
        self.stop_device();
        self.common.set_needs_reset();
        self.interrupt.signal_config();
    }

    /// Stops the device and forgets its driver, so that it neither touches RAM nor interrupts. The
    /// registers stay as they are, for [`VirtioPci::restore`] to overwrite.
    pub fn stop(&mut self) {
        if !self.life.is_idle() {
            self.stop_device();
        }
    }

    fn stop_device(&mut self) {
        for kick in &self.kicks {
            // Not registered (never activated, or served by the kernel): nothing to stop.
            let _ = self.events.remove(kick);
            let _ = kick.read();
        }
        let mut device = Self::locked(&self.device);
        self.life.reset(&mut *device);
    }

    /// The driver wrote 0 to the status, so its settings are dropped. Those of MSI-X belong to the
    /// bus and stay.
    fn reset_by_driver(&mut self) {
        self.stop_device();
        self.common.reset();
        self.interrupt.reset();
    }

    /// Returns to the state after power-on, when the machine is reset.
    pub fn reset(&mut self) -> Result<(), DeviceError> {
        self.reset_by_driver();
        self.msix.reset();
        let refused = |reason| DeviceError::State {
            device: self.name,
            reason,
        };
        self.config.restore(&self.power_on).map_err(refused)?;
        self.move_doorbells();
        Ok(())
    }

    /// Stops the device's work; see [`VirtioDevice::pause`].
    pub fn pause(&mut self) -> Result<(), DeviceError> {
        let paused = {
            let mut device = Self::locked(&self.device);
            self.life.pause(&mut *device)
        };
        self.contain(paused)
    }

    /// Resumes the device's work; see [`VirtioDevice::resume`].
    pub fn resume(&mut self) -> Result<(), DeviceError> {
        let resumed = {
            let mut device = Self::locked(&self.device);
            self.life.resume(&mut *device)
        };
        self.contain(resumed)
    }

    /// Breaks the device on an error. The machine goes on after the driver's mistakes; errors of the
    /// host are the caller's as well.
    fn contain(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        let Err(error) = result else {
            return Ok(());
        };
        self.fail(&error);
        match error {
            DeviceError::Driver { .. } | DeviceError::Queue { .. } => Ok(()),
            DeviceError::Host { .. } | DeviceError::State { .. } => Err(error),
        }
    }

    /// The state of the transport and of its device, from which both can be restored.
    ///
    /// # Errors
    /// The device's, and [`DeviceError::State`] while the device is running.
    pub fn save(&mut self) -> Result<VirtioPciState, DeviceError> {
        if self.life.is_running() {
            return Err(self.name.state_error("the device is running"));
        }
        let device = Self::locked(&self.device);
        let mut common = self.common.save();
        common.msix_vectors(self.interrupt.as_ref());
        for (index, queue) in device.queues() {
            common.set_queue(index, SavedQueue::from(queue));
        }
        Ok(VirtioPciState {
            device_type: device.device_type(),
            config: self.config.save(),
            msix: self.msix.save(),
            common,
            device: device.save()?,
        })
    }

    /// Checks that transport and device can take over a saved state. Nothing is changed. Returns
    /// the features that the device will offer.
    ///
    /// # Errors
    /// The device's, and [`DeviceError::State`].
    pub fn check(&self, state: &VirtioPciState) -> Result<u64, DeviceError> {
        let refuse = |reason: String| self.name.state_error(reason);
        let device = Self::locked(&self.device);
        let device_type = device.device_type();
        if device_type != state.device_type {
            let saved = state.device_type;
            return Err(refuse(format!(
                "it is of a device of type {saved}, not {device_type}"
            )));
        }
        let features = device.check_state(&state.device)?;
        self.config.check(&state.config).map_err(refuse)?;
        let common = &state.common;
        self.common.check(common, features).map_err(refuse)?;
        self.interrupt
            .check(common.config_vector, &common.queue_vectors)
            .map_err(refuse)?;
        self.msix.check(&state.msix).map_err(refuse)?;
        Ok(features)
    }

    /// Restores a saved state, of a new device or of one that has run, whose driver is forgotten.
    /// The device is paused afterwards, until [`VirtioPci::resume`].
    ///
    /// # Errors
    /// Those of [`VirtioPci::check`], before anything is changed, those of the device, and
    /// [`DeviceError::Host`].
    pub fn restore(&mut self, state: &VirtioPciState) -> Result<(), DeviceError> {
        let features = self.check(state)?;
        self.stop();
        Self::locked(&self.device).restore(&state.device)?;
        let refuse = |reason| DeviceError::State {
            device: self.name,
            reason,
        };
        self.config.restore(&state.config).map_err(refuse)?;
        let common = &state.common;
        self.common.restore(common, features).map_err(refuse)?;
        self.interrupt
            .restore(common.config_vector, &common.queue_vectors)
            .map_err(refuse)?;
        self.msix.restore(&state.msix).map_err(refuse)?;
        self.move_doorbells();
        if self.common.is_driver_ready() {
            self.try_activate()?;
            let mut device = Self::locked(&self.device);
            self.life.pause(&mut *device)?;
        }
        Ok(())
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match self.common.write(offset, data, &self.interrupt) {
            Request::Nothing => {}
            Request::Reset => self.reset_by_driver(),
            Request::Activate => self.activate(),
        }
    }

    /// Reads the BAR through the window of the configuration space (VIRTIO 1.3, 4.1.4.9).
    fn config_window(&self) -> Option<(u64, usize)> {
        self.layout.window(&self.config)
    }
}

impl PciDevice for VirtioPci {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.layout.is_window_data(offset)
            && let Some((at, len)) = self.config_window()
        {
            let mut value = [0; 4];
            self.bar_read(0, at, &mut value[..len]);
            return crate::bus::fill(data, &value[..len]);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.layout.is_window_data(offset)
            && let Some((at, len)) = self.config_window()
            && len == data.len()
        {
            self.bar_write(0, at, data);
        }
        if self.layout.touches_msix_control(offset, data.len()) {
            let mut control = [0; 2];
            self.config.read(self.layout.msix_control(), &mut control);
            self.msix.set_control(u16::from_le_bytes(control));
        }
        self.move_doorbells();
    }

    fn bars(&self) -> Vec<BarRange> {
        self.config.bars()
    }

    fn bar_read(&mut self, _index: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match layout::region(offset) {
            layout::Region::Common(at) => self.common.read(at, data, &self.interrupt),
            layout::Region::Device(at) => Self::locked(&self.device).read_config(at, data),
            layout::Region::MsixTable(at) => self.msix.read_table(at, data),
            layout::Region::MsixPending(at) => self.msix.read_pending(at, data),
            // Without INTx there is no interrupt status to read.
            layout::Region::Isr | layout::Region::Notify(_) | layout::Region::Nothing => {}
        }
    }

    fn bar_write(&mut self, _index: u8, offset: u64, data: &[u8]) {
        match layout::region(offset) {
            layout::Region::Common(at) => self.write_common(at, data),
            layout::Region::Device(at) => Self::locked(&self.device).write_config(at, data),
            layout::Region::MsixTable(at) => self.msix.write_table(at, data),
            layout::Region::Notify(at) => {
                // Only accesses that KVM did not take for a doorbell come here: those across one,
                // or through the configuration window.
                let queue = (at / layout::NOTIFY_STRIDE) as usize;
                if let Some(kick) = self.kicks.get(queue) {
                    let _ = kick.write(1);
                }
            }
            layout::Region::Isr | layout::Region::MsixPending(_) | layout::Region::Nothing => {}
        }
    }
}

impl EventHandler for VirtioPci {
    fn handle_event(&mut self, token: u32, ready: EventSet) {
        // A kick is read in every state, so that level-triggered epoll does not spin.
        let queue = token.checked_sub(KICK_TOKEN);
        if let Some(queue) = queue {
            let Some(kick) = self.kicks.get(queue as usize) else {
                return;
            };
            if kick.read().is_err() {
                return;
            }
        }
        let result = {
            let mut device = Self::locked(&self.device);
            match queue {
                Some(queue) => self.life.notify_queue(&mut *device, queue as u16),
                None => self.life.handle_event(&mut *device, token, ready),
            }
        };
        if let Err(error) = result {
            self.fail(&error);
        }
    }
}
