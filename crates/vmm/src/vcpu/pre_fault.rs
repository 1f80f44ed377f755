//! Makes KVM map guest memory before the guest touches it, with few calls instead of an exit for
//! each page.
//!
//! Source: Linux `Documentation/virt/kvm/api.rst`, `KVM_PRE_FAULT_MEMORY` (since 6.11).

use std::ops::Range;

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::VcpuError;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xD5, kvm_pre_fault_memory);

/// Maps `ranges` (page-aligned guest-physical addresses). Where KVM cannot do this, the guest's own
/// faults will map the pages.
pub(super) fn pre_fault(vcpu: &VcpuFd, ranges: &[Range<u64>]) -> Result<(), VcpuError> {
    for range in ranges {
        let mut request = kvm_pre_fault_memory {
            gpa: range.start,
            size: range.end - range.start,
            ..Default::default()
        };
        // The call updates what is left to do, and may be interrupted in between.
        while request.size > 0 {
            // SAFETY: the structure is the one that the call reads and writes, and lives through
            // it. It only maps memory that the VM has.
            let done = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut request) };
            if done == 0 {
                continue;
            }
            match vmm_sys_util::errno::Error::last().errno() {
                libc::EINTR | libc::EAGAIN => {}
                // An older KVM, or one without two-dimensional paging.
                libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL => return Ok(()),
                errno => {
                    return Err(VcpuError::Kvm {
                        action: "map memory ahead of its use",
                        source: kvm_ioctls::Error::new(errno),
                    });
                }
            }
        }
    }
    Ok(())
}
