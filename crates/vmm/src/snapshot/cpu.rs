//! The CPU features that a snapshot needs, in a form that people and schedulers can read.
//!
//! A guest reads CPUID once and uses the features that it found, so a host must offer all features
//! of the saved CPUs. Further features do no harm, because the guest still sees its own CPUID.
//! Schedulers compare profiles to choose a host; the CPU states themselves are checked by
//! [`CpuCeiling`](crate::vcpu::CpuCeiling) when a machine is restored, whatever a profile claims.

use std::collections::BTreeMap;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::machine::{self, MachineError};
use crate::vcpu::features::{self, WORDS};
use crate::vcpu::{VcpuState, vendor};

/// The CPU features that a guest may use, or that a host offers, as far as hosts differ in them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuProfile {
    /// As in `GenuineIntel`.
    pub vendor: String,
    /// The feature bits by leaf and register.
    pub features: BTreeMap<String, u32>,
}

/// The reason for which a host cannot run a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The CPU of another maker behaves differently in ways that no bit shows.
    #[error("it was made on a CPU of {saved}, and this host's is of {here}")]
    Vendor {
        /// The maker of the saved CPU.
        saved: String,
        /// The maker of the host's CPU.
        here: String,
    },
    /// Features are missing.
    #[error("this host's CPU lacks features that its guest may use: {}", .0.join(", "))]
    Features(
        /// As in `avx2 (7.ebx bit 5)`.
        Vec<String>,
    ),
}

impl CpuProfile {
    /// Whether profiles of this version have a word of this name, as in `7.ebx`.
    pub fn is_word(name: &str) -> bool {
        WORDS.iter().any(|word| word.name == name)
    }

    /// The features of saved CPUs: those that any of them has.
    pub fn of_saved(vcpus: &[VcpuState]) -> Self {
        let profiles = vcpus.iter().map(|vcpu| Self::from_entries(vcpu.cpuid()));
        profiles.reduce(Self::union).unwrap_or_default()
    }

    /// The features that a boot on this host gives a guest: those of a CPU that is made for it.
    ///
    /// # Errors
    /// Those of KVM.
    pub fn of_host(kvm: &Kvm) -> Result<Self, MachineError> {
        Ok(Self::from_entries(machine::boot_cpuid(kvm)?.as_slice()))
    }

    fn from_entries(entries: &[kvm_cpuid_entry2]) -> Self {
        let find = |leaf: u32, index: u32| {
            entries
                .iter()
                .find(|entry| entry.function == leaf && entry.index == index)
        };
        let words = WORDS.iter().filter_map(|word| {
            let entry = find(word.leaf, word.index)?;
            let bits = word.register.of(entry) & !word.not_the_hosts;
            Some((word.name.to_owned(), bits))
        });
        Self {
            vendor: vendor(entries),
            features: words.collect(),
        }
    }

    fn union(mut self, other: Self) -> Self {
        for (word, bits) in other.features {
            *self.features.entry(word).or_default() |= bits;
        }
        self
    }

    /// Whether a host of this profile can run a guest that was saved with the profile `saved`.
    /// Words that only one side has count as 0: manifests of former versions have fewer.
    ///
    /// # Errors
    /// [`Mismatch`], with all that is missing.
    pub fn can_run(&self, saved: &Self) -> Result<(), Mismatch> {
        if self.vendor != saved.vendor {
            return Err(Mismatch::Vendor {
                saved: saved.vendor.clone(),
                here: self.vendor.clone(),
            });
        }
        let mut missing = Vec::new();
        for (word, &bits) in &saved.features {
            let lacking = bits & !self.features.get(word).copied().unwrap_or(0);
            let lacking = features::set_bits(lacking);
            missing.extend(lacking.map(|bit| features::name_in(word, bit)));
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Mismatch::Features(missing)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(vendor: &[u8; 12], leaf7_ebx: u32) -> CpuProfile {
        let word = |at: usize| {
            u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]])
        };
        let entries = [
            kvm_cpuid_entry2 {
                function: 0,
                ebx: word(0),
                edx: word(4),
                ecx: word(8),
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: 1,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: 7,
                ebx: leaf7_ebx,
                ..Default::default()
            },
        ];
        CpuProfile::from_entries(&entries)
    }

    #[test]
    fn a_host_with_more_runs_a_guest_with_less_and_not_the_other_way() {
        let (old, new) = (
            profile(b"AuthenticAMD", 0b01),
            profile(b"AuthenticAMD", 0b11),
        );
        assert_eq!(old.vendor, "AuthenticAMD");
        assert_eq!(new.can_run(&old), Ok(()));
        let missing = Mismatch::Features(vec!["tsc_adjust (7.ebx bit 1)".to_owned()]);
        assert_eq!(old.can_run(&new), Err(missing));
    }

    #[test]
    fn what_kvm_makes_itself_does_not_count() {
        let mut host = profile(b"GenuineIntel", 0);
        let guest = host.clone();
        *host.features.get_mut("1.ecx").unwrap() &= !(1 << 24 | 1 << 31);
        assert_eq!(host.can_run(&guest), Ok(()));
    }

    #[test]
    fn another_maker_is_refused_by_name() {
        let (amd, intel) = (profile(b"AuthenticAMD", 0), profile(b"GenuineIntel", 0));
        let error = amd.can_run(&intel).unwrap_err().to_string();
        assert!(
            error.contains("GenuineIntel") && error.contains("AuthenticAMD"),
            "{error}"
        );
    }
}
