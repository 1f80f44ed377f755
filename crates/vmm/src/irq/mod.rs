//! Interrupts and doorbells between devices and the guest.
//!
//! [`IrqRoutes`] hides KVM's interrupt interface from the rest of the machine: message signalled
//! interrupts through irqfds, and eventfds behind guest addresses (ioeventfd). KVM has the local
//! APICs; the I/O APIC ([`ioapic`]) is implemented here (KVM's split irqchip). There is no PIC and
//! no PIT.

pub mod ioapic;
mod kvm;

use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

pub use kvm::KvmIrqRoutes;

/// A message signalled interrupt: a write of `data` to `address`.
///
/// Source: Intel SDM volume 3, 11.11 "Message Signalled Interrupts".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsiMessage {
    /// The destination, in `0xFEEx_xxxx`.
    pub address: u64,
    /// Vector, delivery mode and trigger mode.
    pub data: u32,
}

/// An interrupt line of KVM's routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gsi(pub u32);

/// The routes by which devices interrupt the guest's CPUs, and by which the guest's writes reach
/// devices. A machine uses KVM ([`KvmIrqRoutes`]), and tests a recorder.
pub trait IrqRoutes: Send + Sync {
    /// Allocates a line that has no other user.
    fn allocate(&self) -> io::Result<Gsi>;

    /// Sets the message that `gsi` raises.
    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()>;

    /// Makes a write to `fd` raise `gsi`. A write that was made before counts as well.
    fn connect(&self, fd: &EventFd, gsi: Gsi) -> io::Result<()>;

    /// Undoes [`IrqRoutes::connect`]; writes then stay pending in `fd`.
    fn disconnect(&self, fd: &EventFd, gsi: Gsi) -> io::Result<()>;

    /// Raises an interrupt at once.
    fn signal(&self, message: MsiMessage) -> io::Result<()>;

    /// Has the kernel count the guest's writes to `address`, of any size and value, in `fd`.
    fn register_ioeventfd(&self, address: u64, fd: &EventFd) -> io::Result<()>;

    /// Undoes [`IrqRoutes::register_ioeventfd`].
    fn unregister_ioeventfd(&self, address: u64, fd: &EventFd) -> io::Result<()>;
}

/// Routes that record interrupts instead of raising them, for tests.
#[cfg(test)]
pub(crate) mod testing {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    pub(crate) struct RecordingIrqRoutes {
        pub(crate) routes: Mutex<BTreeMap<u32, MsiMessage>>,
        pub(crate) connected: Mutex<Vec<u32>>,
        pub(crate) signalled: Mutex<Vec<MsiMessage>>,
        pub(crate) registered: Mutex<Vec<u64>>,
        next: Mutex<u32>,
    }

    impl IrqRoutes for RecordingIrqRoutes {
        fn allocate(&self) -> io::Result<Gsi> {
            let mut next = self.next.lock().unwrap();
            *next += 1;
            Ok(Gsi(*next + 23))
        }
        fn set_route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()> {
            self.routes.lock().unwrap().insert(gsi.0, message);
            Ok(())
        }
        fn connect(&self, _fd: &EventFd, gsi: Gsi) -> io::Result<()> {
            self.connected.lock().unwrap().push(gsi.0);
            Ok(())
        }
        fn disconnect(&self, _fd: &EventFd, gsi: Gsi) -> io::Result<()> {
            self.connected
                .lock()
                .unwrap()
                .retain(|&other| other != gsi.0);
            Ok(())
        }
        fn signal(&self, message: MsiMessage) -> io::Result<()> {
            self.signalled.lock().unwrap().push(message);
            Ok(())
        }
        fn register_ioeventfd(&self, address: u64, _fd: &EventFd) -> io::Result<()> {
            self.registered.lock().unwrap().push(address);
            Ok(())
        }
        fn unregister_ioeventfd(&self, address: u64, _fd: &EventFd) -> io::Result<()> {
            self.registered
                .lock()
                .unwrap()
                .retain(|&other| other != address);
            Ok(())
        }
    }
}
