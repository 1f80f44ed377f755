//! Whether this host's CPU can go on where another stopped.
//!
//! A guest has looked at CPUID once and for all; it uses what it found. So a host must offer all
//! features of the saved CPU. Others on top do no harm: the guest is told what it was told.
//!
//! Source: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

use std::collections::BTreeMap;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use crate::vcpu::VcpuState;

/// A register of a CPUID leaf, of which each bit is a feature.
struct Word {
    name: &'static str,
    leaf: u32,
    index: u32,
    register: fn(&kvm_cpuid_entry2) -> u32,
    /// Bits that are no features of the host's CPU: KVM or the guest's own settings make them.
    not_the_hosts: u32,
}

/// The words of features that programs look at.
const WORDS: [Word; 8] = [
    // TSC deadline, x2APIC, OSXSAVE, hypervisor.
    Word {
        name: "1.ecx",
        leaf: 1,
        index: 0,
        register: |e| e.ecx,
        not_the_hosts: 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31,
    },
    // Hyper-threading, which is the number of CPUs.
    Word {
        name: "1.edx",
        leaf: 1,
        index: 0,
        register: |e| e.edx,
        not_the_hosts: 1 << 28,
    },
    Word {
        name: "7.ebx",
        leaf: 7,
        index: 0,
        register: |e| e.ebx,
        not_the_hosts: 0,
    },
    // OSPKE.
    Word {
        name: "7.ecx",
        leaf: 7,
        index: 0,
        register: |e| e.ecx,
        not_the_hosts: 1 << 4,
    },
    Word {
        name: "7.edx",
        leaf: 7,
        index: 0,
        register: |e| e.edx,
        not_the_hosts: 0,
    },
    Word {
        name: "d.1.eax",
        leaf: 0xD,
        index: 1,
        register: |e| e.eax,
        not_the_hosts: 0,
    },
    Word {
        name: "80000001.ecx",
        leaf: 0x8000_0001,
        index: 0,
        register: |e| e.ecx,
        not_the_hosts: 0,
    },
    Word {
        name: "80000001.edx",
        leaf: 0x8000_0001,
        index: 0,
        register: |e| e.edx,
        not_the_hosts: 0,
    },
];

/// What a guest was told of its CPU, as far as hosts differ in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuProfile {
    /// As in `GenuineIntel`.
    pub vendor: String,
    /// Feature bits by leaf and register.
    pub features: BTreeMap<String, u32>,
}

/// What a host lacks for a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Another maker's CPU behaves differently in ways that no bit tells.
    #[error("it was made on a CPU of {saved}, and this host's is of {here}")]
    Vendor {
        /// The guest's.
        saved: String,
        /// The host's.
        here: String,
    },
    /// Features are missing.
    #[error("this host's CPU lacks features that its guest may use: {}", .0.join(", "))]
    Features(
        /// As in `7.ebx bit 5`.
        Vec<String>,
    ),
}

impl CpuProfile {
    /// What the guest of `state` was told.
    pub fn of(state: &VcpuState) -> Self {
        Self::from_entries(state.cpuid())
    }

    /// What this host can offer (`KVM_GET_SUPPORTED_CPUID`).
    pub fn of_host(supported: &CpuId) -> Self {
        Self::from_entries(supported.as_slice())
    }

    fn from_entries(entries: &[kvm_cpuid_entry2]) -> Self {
        let find = |leaf: u32, index: u32| {
            entries
                .iter()
                .find(|entry| entry.function == leaf && entry.index == index)
        };
        let vendor = find(0, 0).map_or_else(String::new, |entry| {
            let bytes = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
            String::from_utf8_lossy(&bytes.concat()).into_owned()
        });
        let words = WORDS.iter().filter_map(|word| {
            let bits = (word.register)(find(word.leaf, word.index)?) & !word.not_the_hosts;
            Some((word.name.to_owned(), bits))
        });
        Self {
            vendor,
            features: words.collect(),
        }
    }

    /// Whether a host of this profile can run a guest of `saved`'s.
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
            let lacking = (0..32).filter(|bit| lacking >> bit & 1 == 1);
            missing.extend(lacking.map(|bit| format!("{word} bit {bit}")));
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
        let missing = Mismatch::Features(vec!["7.ebx bit 1".to_owned()]);
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
