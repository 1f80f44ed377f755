//! The registers that the first CPU starts with, by boot protocol.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::boot::Entry;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// The flag that is always set.
const RFLAGS: u64 = 2;
const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs on, write-back by default. Firmware would set this, and there is none.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets CPU registers for `entry`.
pub(super) fn set(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let mut regs = kvm_regs {
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry {
        Entry::Pvh { rip, start_info } => {
            set_segments(&mut sregs, false);
            sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
            sregs.cr4 = 0;
            regs.rip = rip;
            regs.rbx = start_info;
        }
        Entry::Linux64 {
            rip,
            boot_params,
            page_tables,
        } => {
            set_segments(&mut sregs, true);
            sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
            sregs.cr3 = page_tables;
            sregs.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
            sregs.efer |= EFER_LONG_MODE;
            regs.rip = rip;
            regs.rsi = boot_params;
        }
    }
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)
}

/// Sets the MSRs that firmware would have set, on every CPU.
pub(super) fn set_firmware_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ];
    // They are set one at a time, because a CPU without one of them must still get the others.
    for entry in entries {
        let msrs =
            Msrs::from_entries(&[entry]).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        if vcpu.set_msrs(&msrs)? == 0 {
            tracing::debug!(
                index = entry.index,
                "this CPU lacks an MSR that firmware would set"
            );
        }
    }
    Ok(())
}

/// Flat segments over all 4 GiB, or 64-bit ones.
fn set_segments(sregs: &mut kvm_sregs, long_mode: bool) {
    let data = kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector: 0x10,
        // Read and write, accessed.
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let (l, db) = if long_mode { (1, 0) } else { (0, 1) };
    // Execute and read, accessed.
    sregs.cs = kvm_segment {
        selector: 0x08,
        type_: 11,
        l,
        db,
        ..data
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    // A busy 32-bit (in long mode, 64-bit) task state segment.
    sregs.tr = kvm_segment {
        selector: 0x18,
        type_: 11,
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..data
    };
}
