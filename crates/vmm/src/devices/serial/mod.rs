//! The serial console: a 16550 at the first PC port.
//!
//! The registers are implemented by `vm-superio`. The guest's output goes to a writer. Input comes
//! by [`Serial::input`], as much as the guest's queue takes, and an eventfd is written when there
//! is room again. The VM process decides who is attached and what is logged.

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
/// The number of its registers.
pub const PORT_COUNT: u64 = 8;

/// Receives the guest's output. It must not block, because a vCPU calls it.
pub type Output = Box<dyn Write + Send>;

/// Raises an interrupt by a pulse on a pin of the I/O APIC.
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

/// Notifies the console when the guest has read all input.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // EAGAIN means that the counter is at its limit, so the console is notified already.
        let _ = self.0.write(1);
    }
}

/// The output of the port, which it shares with the port that follows it at a reset.
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
    /// A port in `state`, on `pin` of the I/O APIC, which prints to `output`.
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

    /// Puts the port into `state`. Output and input stay connected.
    pub fn restore(&self, state: SerialState) -> io::Result<()> {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        let pin = uart.interrupt_evt().clone();
        let drained = Drained(uart.events().0.try_clone()?);
        let output = uart.writer().clone();
        *uart = self::uart(state, pin, drained, output)?;
        // Input that waits may come now.
        uart.events().in_buffer_empty();
        Ok(())
    }

    /// Passes `bytes` to the guest as input. Returns how many of them the guest's queue took.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        let room = uart.fifo_capacity().min(bytes.len());
        if room == 0 {
            return 0;
        }
        // In loop-back mode the port takes no input, and returns an error or 0.
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

    /// The registers and the input queue.
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
            // The guest cannot be told, and must not be stopped by a console that lost its log.
            tracing::debug!(?error, "serial output was lost");
        }
    }
}
