//! The ceiling: the most that a boot on this host gives each CPU of a machine. A saved CPU must
//! stay within it.
//!
//! A saved state may come from another host, or from an attacker, and KVM accepts much that no boot
//! would give a guest: nested virtualisation, Hyper-V's interfaces, features that this host's CPU
//! lacks, another CPU's place in the topology. One ceiling serves both sides: a boot sets it, and a
//! saved CPU that exceeds it is refused by the feature's name. KVM itself checks reserved bits of
//! most registers and non-canonical addresses.
//!
//! [`msrs`] has the rules for MSRs, [`registers`] those for all other state.
//!
//! Source: Intel SDM volumes 2 (CPUID) and 4 (MSRs); AMD APM volumes 2 and 3.

mod msrs;
mod registers;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Kvm, VcpuFd};

use self::msrs::MsrValues;
pub(super) use self::msrs::is_saved as is_saved_msr;
use super::VcpuError;
use super::cpuid::{self, ONCE_SHOWN_LEAVES, TOPOLOGY_LEAVES};
use super::features::{self, Register};
use super::saved::VcpuState;

/// Leaf 1 ECX: OSXSAVE, which the guest sets by CR4.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 7 ECX: OSPKE, which the guest sets by CR4.
const OSPKE: u32 = 1 << 4;

/// The reason for which a saved CPU is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The CPU of another maker behaves differently in ways that no bit shows.
    #[error("it was saved on a CPU of {saved}, and this host's is of {here}")]
    Vendor {
        /// The maker of the saved CPU.
        saved: String,
        /// The maker of this host's CPU.
        here: String,
    },
    /// The CPU has features that a boot on this host would not give it.
    #[error("it has features that a boot on this host would not give it: {}", .0.join(", "))]
    Exceeds(
        /// The features, as in `svm (80000001.ecx bit 2)`.
        Vec<String>,
    ),
    /// The state is not that of a CPU in this place of a machine.
    #[error("{0}")]
    Invalid(String),
}

impl Refusal {
    fn exceeds(feature: impl Into<String>) -> Self {
        Self::Exceeds(vec![feature.into()])
    }

    fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid(reason.into())
    }
}

/// The most that a boot on this host gives each of a machine's CPUs.
pub struct CpuCeiling {
    /// `KVM_GET_SUPPORTED_CPUID`.
    supported: CpuId,
    /// The number of CPUs of the machine.
    count: u8,
    /// `KVM_GET_MSR_INDEX_LIST`, in its order.
    msrs: Vec<u32>,
}

impl CpuCeiling {
    /// Asks KVM what it supports for a machine of `count` CPUs.
    ///
    /// # Errors
    /// The errors of KVM.
    pub fn new(kvm: &Kvm, count: u8) -> Result<Self, VcpuError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VcpuError::kvm("ask for the supported CPUID"))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(VcpuError::kvm("list the MSRs"))?;
        Ok(Self {
            supported,
            count,
            msrs: msrs.as_slice().to_vec(),
        })
    }

    /// Gives a new CPU its CPUID, as CPU `id`.
    ///
    /// # Errors
    /// The errors of KVM.
    pub(crate) fn set_cpuid(&self, vcpu: &VcpuFd, id: u8) -> Result<(), VcpuError> {
        let cpuid = CpuId::from_entries(&self.cpuid(id))
            .map_err(|_| VcpuError::Corrupt("too many CPUID entries"))?;
        vcpu.set_cpuid2(&cpuid).map_err(VcpuError::kvm("set CPUID"))
    }

    fn cpuid(&self, id: u8) -> Vec<kvm_cpuid_entry2> {
        cpuid::for_vcpu(&self.supported, id, self.count)
    }

    /// The MSRs that are part of a CPU's state.
    pub(super) fn saved_msrs(&self) -> Vec<u32> {
        let all = self.msrs.iter().copied();
        all.filter(|&index| is_saved_msr(index)).collect()
    }

    /// Checks the saved state of CPU `id` against that CPU as a boot made it: its CPUID, as KVM
    /// gives it back, and its MSRs, of which `boot_values` reads those that matter.
    pub(super) fn check(
        &self,
        id: u8,
        state: &VcpuState,
        boot_cpuid: &[kvm_cpuid_entry2],
        boot_values: impl FnOnce(&[u32]) -> Result<Vec<(u32, u64)>, VcpuError>,
    ) -> Result<(), VcpuError> {
        let refused = |refusal| VcpuError::Refused { vcpu: id, refusal };
        let cpuid = self.check_cpuid(id, state.cpuid(), boot_cpuid);
        cpuid.map_err(refused)?;
        registers::check(id, state).map_err(refused)?;
        let to_compare = MsrValues::to_compare(&state.msrs);
        let boot = MsrValues {
            known: &self.msrs,
            boot: boot_values(&to_compare)?.into_iter().collect(),
        };
        boot.check(state).map_err(refused)
    }

    /// Checks that CPU `id`, whose CPUID cannot change any more, has no feature that the saved
    /// state lacks. With [`CpuCeiling::check`] this makes the two the same CPU.
    pub(super) fn check_same(
        &self,
        id: u8,
        state: &VcpuState,
        present: &[kvm_cpuid_entry2],
    ) -> Result<(), VcpuError> {
        let same = self.check_cpuid(id, present, state.cpuid());
        same.map_err(|refusal| {
            let reason = format!("the CPU runs already, and is another one: {refusal}");
            let refusal = Refusal::Invalid(reason);
            VcpuError::Refused { vcpu: id, refusal }
        })
    }

    fn check_cpuid(
        &self,
        id: u8,
        saved: &[kvm_cpuid_entry2],
        boot: &[kvm_cpuid_entry2],
    ) -> Result<(), Refusal> {
        let (saved_vendor, here) = (vendor(saved), vendor(boot));
        if saved_vendor != here {
            return Err(Refusal::Vendor {
                saved: saved_vendor,
                here,
            });
        }
        check_form(saved, boot)?;
        let mut excess = Vec::new();
        for entry in saved {
            let leaf = Leaf {
                saved: *entry,
                boot: self.boot_entry(boot, entry),
            };
            excess.extend(leaf.excess());
            leaf.check_topology(id, self.count)?;
        }
        match excess.is_empty() {
            true => Ok(()),
            false => Err(Refusal::Exceeds(excess)),
        }
    }

    /// The leaf that a boot gives in the place of a saved one, which is all zero where a boot gives
    /// none.
    fn boot_entry(&self, boot: &[kvm_cpuid_entry2], saved: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
        let here = match ONCE_SHOWN_LEAVES.contains(&saved.function) {
            true => self.supported.as_slice(),
            false => boot,
        };
        let found = here.iter().find(|entry| is_same_leaf(entry, saved));
        found.copied().unwrap_or(kvm_cpuid_entry2 {
            function: saved.function,
            index: saved.index,
            ..Default::default()
        })
    }
}

/// The CPU's maker in leaf 0, as in `GenuineIntel`.
pub(crate) fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let first = cpuid.iter().find(|entry| entry.function == 0);
    first.map_or_else(String::new, |entry| {
        let bytes = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
        String::from_utf8_lossy(&bytes.concat()).into_owned()
    })
}

fn is_same_leaf(one: &kvm_cpuid_entry2, other: &kvm_cpuid_entry2) -> bool {
    one.function == other.function && one.index == other.index
}

/// Checks that each leaf is there once, and that its index counts where it does at a boot. KVM
/// takes the first entry that matches, and an entry whose index does not count matches all.
fn check_form(saved: &[kvm_cpuid_entry2], boot: &[kvm_cpuid_entry2]) -> Result<(), Refusal> {
    let mut seen = BTreeSet::new();
    for entry in saved {
        let (leaf, index) = (entry.function, entry.index);
        if !seen.insert((leaf, index)) {
            let reason = format!("its CPUID has leaf {leaf:#x}, index {index} twice");
            return Err(Refusal::invalid(reason));
        }
        let of_boot = boot.iter().find(|boot| boot.function == leaf);
        let counts = |entry: &kvm_cpuid_entry2| entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        if of_boot.is_some_and(|boot| counts(boot) != counts(entry)) {
            let reason = format!("its CPUID leaf {leaf:#x} has another form than at a boot");
            return Err(Refusal::invalid(reason));
        }
    }
    Ok(())
}

/// The way in which a register of a leaf is compared with a boot's.
enum Rule {
    /// The register describes the CPU (model, caches, frequencies, sizes), and KVM does not use it.
    Free,
    /// The register may have only bits that a boot gives, and these, which the guest sets.
    Bits { guests: u32 },
    /// Each byte is a number, which may not be larger than at a boot.
    AtMost,
    /// The register is the same as at a boot, or zero.
    Exact,
}

/// A saved leaf, and the leaf that a boot gives.
struct Leaf {
    saved: kvm_cpuid_entry2,
    boot: kvm_cpuid_entry2,
}

impl Leaf {
    fn rule(&self, register: Register) -> Rule {
        use Register::{Eax, Ebx, Ecx, Edx};
        match (self.saved.function, self.saved.index, register) {
            // The vendor is compared by itself, and the topology.
            (0 | 2 | 4 | 0xB | 0x15 | 0x16 | 0x1F, ..) | (1, _, Eax | Ebx) => Rule::Free,
            // Brand strings, caches, translation buffers, cache topology.
            (0x8000_0000 | 0x8000_0002..=0x8000_0006, ..) => Rule::Free,
            (0x8000_0019 | 0x8000_001D | 0x8000_001E, ..) => Rule::Free,
            // The highest index, and where microcode may be updated.
            (7, 0, Eax) | (0x8000_0021, _, Ebx) => Rule::Free,
            (1, _, Ecx) => Rule::Bits { guests: OSXSAVE },
            (7, 0, Ecx) => Rule::Bits { guests: OSPKE },
            // Sizes that follow from the components, which are bits.
            (0xD, 0, Ebx | Ecx) | (0xD, 1, Ebx) => Rule::Free,
            (0xD, 2.., _) => Rule::Exact,
            (0x4000_0000, _, Eax) => Rule::Free,
            (0x4000_0000, ..) => Rule::Exact,
            // The widths of addresses.
            (0x8000_0008, _, Eax) => Rule::AtMost,
            (0x8000_0008, _, Ecx | Edx) => Rule::Free,
            _ => Rule::Bits { guests: 0 },
        }
    }

    /// The features that the saved leaf has and a boot's does not.
    fn excess(&self) -> Vec<String> {
        let registers = Register::ALL.into_iter();
        registers
            .flat_map(|register| self.excess_of(register))
            .collect()
    }

    fn excess_of(&self, register: Register) -> Vec<String> {
        let (saved, boot) = (register.of(&self.saved), register.of(&self.boot));
        let (leaf, index) = (self.saved.function, self.saved.index);
        let larger = |what: &str| vec![format!("{what} of CPUID leaf {leaf:#x}, index {index}")];
        match self.rule(register) {
            Rule::Bits { guests } => {
                features::names(leaf, index, register, saved & !boot & !guests)
            }
            Rule::AtMost if is_larger(saved, boot) => larger("the address widths"),
            Rule::Exact if saved != 0 && saved != boot => larger("the content"),
            Rule::AtMost | Rule::Exact | Rule::Free => Vec::new(),
        }
    }

    /// Whether the leaf describes CPU `id` as a boot would.
    fn check_topology(&self, id: u8, count: u8) -> Result<(), Refusal> {
        let saved = &self.saved;
        let mut fitted = match TOPOLOGY_LEAVES.contains(&saved.function) {
            true => self.boot,
            false => *saved,
        };
        cpuid::set_topology(&mut fitted, id, count);
        // The flag for several CPUs may be missing. It is compared as a feature.
        fitted.edx = match saved.function {
            1 => saved.edx,
            _ => fitted.edx,
        };
        let is_same = |register: Register| register.of(saved) == register.of(&fitted);
        match Register::ALL.into_iter().all(is_same) {
            true => Ok(()),
            false => Err(Refusal::invalid(format!(
                "its CPUID leaf {:#x}, index {} is not that of CPU {id} of {count}",
                saved.function, saved.index
            ))),
        }
    }
}

fn is_larger(saved: u32, boot: u32) -> bool {
    let bytes = saved.to_le_bytes().into_iter().zip(boot.to_le_bytes());
    bytes.into_iter().any(|(saved, boot)| saved > boot)
}
