//! Guest RAM as KVM's memory slots.

use clone_memory::GuestMemory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::MachineError;

/// Registers each region of RAM as a slot.
pub(super) fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), MachineError> {
    for (slot, region) in (0..).zip(memory.regions()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.guest_start.0,
            memory_size: region.size,
            userspace_addr: region.host_address,
        };
        // SAFETY: the range is mapped, and stays mapped until after the VM is closed, because the
        // machine drops its CPUs and its VM before its memory.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(MachineError::kvm("give the guest its RAM"))?;
    }
    Ok(())
}
