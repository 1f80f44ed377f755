//! The saved state of a CPU as plain data.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

/// `IA32_TSC`.
pub(super) const MSR_TSC: u32 = 0x10;

/// The saved state of one CPU. Byte images are KVM's own structures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) xcrs: kvm_xcrs,
    /// `KVM_GET_XSAVE2`, in words, as long as the host's CPU makes it.
    pub(super) xsave: Vec<u32>,
    pub(super) lapic: kvm_lapic_state,
    /// Index and value of every MSR that KVM lists, could read, and a boot does not hide.
    pub(super) msrs: Vec<(u32, u64)>,
    pub(super) events: kvm_vcpu_events,
    pub(super) debug_registers: kvm_debugregs,
    pub(super) mp_state: kvm_mp_state,
    /// The TSC's frequency.
    pub(super) tsc_khz: u32,
}

impl VcpuState {
    /// The time-stamp counter when it was saved.
    pub(crate) fn tsc(&self) -> Option<u64> {
        let tsc = self.msrs.iter().find(|(index, _)| *index == MSR_TSC);
        tsc.map(|(_, value)| *value)
    }

    /// An empty state, for tests of the code that stores states.
    #[cfg(any(test, feature = "testing"))]
    pub fn blank() -> Self {
        Self {
            cpuid: Vec::new(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xcrs: kvm_xcrs::default(),
            xsave: vec![1, 2, 3],
            lapic: kvm_lapic_state::default(),
            msrs: vec![(MSR_TSC, 5)],
            events: kvm_vcpu_events::default(),
            debug_registers: kvm_debugregs::default(),
            mp_state: kvm_mp_state::default(),
            tsc_khz: 7,
        }
    }

    /// The CPUID that the guest sees.
    pub(crate) fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }
}

/// Access for tests that change a state to have it refused.
#[cfg(any(test, feature = "testing"))]
impl VcpuState {
    /// The CPUID that the guest sees.
    pub fn cpuid_entries(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// The CPUID that the guest sees, to be changed.
    pub fn cpuid_entries_mut(&mut self) -> &mut Vec<kvm_cpuid_entry2> {
        &mut self.cpuid
    }

    /// The control and segment registers.
    pub fn system_registers_mut(&mut self) -> &mut kvm_sregs {
        &mut self.sregs
    }

    /// Index and value of each MSR.
    pub fn msr_values_mut(&mut self) -> &mut Vec<(u32, u64)> {
        &mut self.msrs
    }
}
