//! [`IrqRoutes`] over KVM: GSI routing, irqfd, ioeventfd, `KVM_SIGNAL_MSI`.
//!
//! Source: Linux `Documentation/virt/kvm/api.rst`.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::ioapic::PIN_COUNT;
use super::{Gsi, IrqRoutes, MsiMessage};

/// The number of lines that KVM's routing table can hold (`KVM_MAX_IRQ_ROUTES` on x86).
const MAX_ROUTES: u32 = 4096;

/// The interrupt routes of a VM. Lines below [`PIN_COUNT`] are the I/O APIC's pins, which need no
/// route: their messages are sent by `signal`.
pub struct KvmIrqRoutes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

struct Table {
    next: u32,
    routes: BTreeMap<u32, MsiMessage>,
}

impl KvmIrqRoutes {
    /// The interrupt routes of `vm`, which must have a split irqchip.
    pub fn new(vm: Arc<VmFd>) -> Self {
        let table = Table {
            next: PIN_COUNT as u32,
            routes: BTreeMap::new(),
        };
        Self {
            vm,
            table: Mutex::new(table),
        }
    }
}

/// The whole routing table, which is what KVM takes.
fn routing_table(routes: &BTreeMap<u32, MsiMessage>) -> io::Result<KvmIrqRouting> {
    let entries: Vec<_> = routes
        .iter()
        .map(|(&gsi, message)| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: message.address as u32,
                    address_hi: (message.address >> 32) as u32,
                    data: message.data,
                    __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
                },
            },
            ..Default::default()
        })
        .collect();
    KvmIrqRouting::from_entries(&entries).map_err(|_| io::Error::from_raw_os_error(libc::ENOSPC))
}

impl IrqRoutes for KvmIrqRoutes {
    fn allocate(&self) -> io::Result<Gsi> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.next == MAX_ROUTES {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let gsi = Gsi(table.next);
        table.next += 1;
        Ok(gsi)
    }

    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.routes.insert(gsi.0, message) == Some(message) {
            return Ok(());
        }
        Ok(self.vm.set_gsi_routing(&routing_table(&table.routes)?)?)
    }

    fn connect(&self, fd: &EventFd, gsi: Gsi) -> io::Result<()> {
        Ok(self.vm.register_irqfd(fd, gsi.0)?)
    }

    fn disconnect(&self, fd: &EventFd, gsi: Gsi) -> io::Result<()> {
        Ok(self.vm.unregister_irqfd(fd, gsi.0)?)
    }

    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        // The result is the number of CPUs that took the message. It is 0 where the guest blocked
        // it, which is not an error.
        self.vm.signal_msi(kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        })?;
        Ok(())
    }

    fn register_ioeventfd(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        Ok(self
            .vm
            .register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn unregister_ioeventfd(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        Ok(self
            .vm
            .unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}
