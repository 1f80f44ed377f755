//! The serial console: a 16550 at the first PC port.
//!
//! The part itself is `vm-superio`'s. What the guest prints goes to a writer; what is typed comes
//! in by [`Serial::input`], as much as the guest's queue takes, and an eventfd tells when there is
//! room again. Who listens and what is logged is left to the VM process.

mod state;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::irq::ioapic::Ioapic;

pub use state::SerialState;

/// The first serial port of a PC.
pub const COM1_PORT: u16 = 0x3F8;
/// Its registers.
pub const PORT_COUNT: u64 = 8;

/// Where the guest's output goes. It must not block: it is called from a vCPU.
pub type Output = Box<dyn Write + Send>;

/// A pulse on a pin of the I/O APIC.
#[derive(Clone)]
struct Pin {
    ioapic: Arc<Ioapic>,
    pin: usize,
}

impl Trigger for Pin {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.ioapic.pulse(self.pin);
        Ok(())
    }
}

/// Tells the console when the guest has read all input.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // EAGAIN: the counter is at its limit, so the news is there already.
        let _ = self.0.write(1);
    }
}

/// Where the port prints: shared with the port that follows it at a reset.
#[derive(Clone)]
struct SharedOutput(Arc<Mutex<Output>>);

impl SharedOutput {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for SharedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lock().flush()
    }
}

/// The serial port; shared by the vCPUs and the console.
pub struct Serial {
    uart: Mutex<Uart<Pin, Drained, SharedOutput>>,
}

impl Serial {
    /// A port in `state`, on `pin` of the I/O APIC, printing to `output`.
    ///
    /// Fails where the state holds more input than the port's queue (a hostile snapshot), or
    /// where the host has no file descriptor left.
    pub fn new(
        state: SerialState,
        ioapic: Arc<Ioapic>,
        pin: usize,
        output: Output,
    ) -> io::Result<Self> {
        let drained = Drained(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let output = SharedOutput(Arc::new(Mutex::new(output)));
        Ok(Self {
            uart: Mutex::new(uart(state, Pin { ioapic, pin }, drained, output)?),
        })
    }

    /// Puts it into `state`: who listens and who types stay.
    pub fn restore(&self, state: SerialState) -> io::Result<()> {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        let pin = uart.interrupt_evt().clone();
        let drained = Drained(uart.events().0.try_clone()?);
        let output = uart.writer().clone();
        *uart = self::uart(state, pin, drained, output)?;
        // What waits to be typed may come now.
        uart.events().in_buffer_empty();
        Ok(())
    }

    /// Types `bytes`; returns how many the guest's queue took.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        let room = uart.fifo_capacity().min(bytes.len());
        if room == 0 {
            return 0;
        }
        // In loop-back mode the port takes nothing, and says so with an error or 0.
        uart.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }

    /// An eventfd that is written whenever the guest has read all its input.
    pub fn drained(&self) -> io::Result<EventFd> {
        self.uart
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .events()
            .0
            .try_clone()
    }

    /// Its registers and input queue.
    pub fn save(&self) -> SerialState {
        self.uart
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .state()
            .into()
    }
}

fn uart(
    state: SerialState,
    pin: Pin,
    drained: Drained,
    output: SharedOutput,
) -> io::Result<Uart<Pin, Drained, SharedOutput>> {
    Uart::from_state(&state.into(), pin, drained, output)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{error:?}")))
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        data[0] = uart.read(offset as u8);
        data[1..].fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = uart.write(offset as u8, data[0]) {
            // The guest cannot be told; a console that lost its log must not stop it.
            tracing::debug!(?error, "serial output lost");
        }
    }
}
