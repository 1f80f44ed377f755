//! The MSRs that are part of a CPU's state, and the values that they may have on this host.
//!
//! KVM accepts values of MSRs without regard to the guest's CPUID. So the rules here name the
//! features that each MSR depends on. An MSR without a rule is plain state, if KVM lists it.

use std::collections::{BTreeMap, BTreeSet};

use kvm_bindings::kvm_cpuid_entry2;

use super::super::features::{Feature, Register, set_bits};
use super::super::saved::VcpuState;
use super::Refusal;
use Register::{Eax, Ebx, Ecx, Edx};

/// The way in which an MSR's saved value is checked. A value that a boot gives is always accepted.
enum Rule {
    /// The value is the guest's own, and KVM checks it.
    State,
    /// Any of these features lets a guest set the MSR.
    Needs(&'static [Feature]),
    /// The MSR reports features, one bit each. It may have only bits that a boot gives, and these.
    Reports { harmless: u64 },
    /// The MSR turns on a feature that no guest gets, and is not part of the state.
    Hidden,
    /// The MSR only reports something of the host or the time, and is not part of the state.
    Ignored,
}

const fn in_leaf_7(register: Register, bit: u32) -> Feature {
    Feature::new(7, 0, register, bit)
}

const fn of_kvm(bit: u32) -> Feature {
    Feature::new(0x4000_0001, 0, Eax, bit)
}

const fn of_amd(leaf: u32, register: Register, bit: u32) -> Feature {
    Feature::new(0x8000_0000 | leaf, 0, register, bit)
}

/// Intel's performance counters exist from version 1 on.
const COUNTERS: [Feature; 3] = [
    Feature::new(0xA, 0, Eax, 0),
    Feature::new(0xA, 0, Eax, 1),
    Feature::new(0xA, 0, Eax, 2),
];
const SPECULATION: [Feature; 6] = [
    in_leaf_7(Edx, 26),
    in_leaf_7(Edx, 27),
    in_leaf_7(Edx, 31),
    of_amd(8, Ebx, 14),
    of_amd(8, Ebx, 15),
    of_amd(8, Ebx, 24),
];
/// Shadow stacks and indirect branch tracking.
const CONTROL_FLOW: [Feature; 2] = [in_leaf_7(Ecx, 7), in_leaf_7(Edx, 20)];
/// IA32_FEATURE_CONTROL: locked (what Linux does), and local machine checks.
const FEATURE_CONTROL_HARMLESS: u64 = 1 | 1 << 20;
/// IA32_ARCH_CAPABILITIES: RSBA and RRSBA, which only ask for more care.
const ARCH_CAPABILITIES_HARMLESS: u64 = 1 << 2 | 1 << 19;
/// DE_CFG: a serialising LFENCE, which Linux turns on at its start.
const DE_CFG_HARMLESS: u64 = 1 << 1;

fn rule(index: u32) -> (&'static str, Rule) {
    match index {
        0x3A => reports("IA32_FEATURE_CONTROL", FEATURE_CONTROL_HARMLESS),
        0x48 => needs("IA32_SPEC_CTRL", &SPECULATION),
        0x9E => hidden("IA32_SMBASE (system management mode)"),
        0xCE => reports("MSR_PLATFORM_INFO", 0),
        0xC1..=0xC8 | 0x186..=0x18D | 0x309..=0x30C | 0x38D..=0x390 | 0x4C1..=0x4C8 => {
            needs("performance counters", &COUNTERS)
        }
        0x3F1 | 0x3F2 | 0x600 => needs("event-based sampling", &COUNTERS),
        0xE1 => needs("IA32_UMWAIT_CONTROL", const { &[in_leaf_7(Ecx, 5)] }),
        0x10A => reports("IA32_ARCH_CAPABILITIES", ARCH_CAPABILITIES_HARMLESS),
        0x122 => needs("IA32_TSX_CTRL", const { &[in_leaf_7(Edx, 29)] }),
        0x1C4 | 0x1C5 => needs("IA32_XFD", const { &[Feature::new(0xD, 1, Eax, 4)] }),
        0x345 => reports("IA32_PERF_CAPABILITIES", 0),
        0x480..=0x493 => hidden("VMX"),
        0x560..=0x587 => needs("Intel PT", const { &[in_leaf_7(Ebx, 25)] }),
        0x6A0 | 0x6A2 | 0x6A4..=0x6A8 => needs("control-flow enforcement", &CONTROL_FLOW),
        0xD90 => needs("IA32_BNDCFGS", const { &[in_leaf_7(Ebx, 14)] }),
        0xDA0 => needs("IA32_XSS", const { &[Feature::new(0xD, 1, Eax, 3)] }),
        0x4000_0002 | 0x4000_0010 | 0x4000_0020 | 0x4000_0022 | 0x4000_0023 => {
            ("Hyper-V's figures", Rule::Ignored)
        }
        0x4000_0000..=0x4000_0FFF => hidden("Hyper-V's interfaces"),
        // KVM has one clock behind both pairs.
        0x11 | 0x12 | 0x4B56_4D00 | 0x4B56_4D01 => {
            needs("kvmclock", const { &[of_kvm(0), of_kvm(3)] })
        }
        0x4B56_4D02 => needs("kvm_asyncpf", const { &[of_kvm(4)] }),
        0x4B56_4D03 => needs("kvm_steal_time", const { &[of_kvm(5)] }),
        0x4B56_4D04 => needs("kvm_pv_eoi", const { &[of_kvm(6)] }),
        0x4B56_4D05 => needs("kvm_poll_control", const { &[of_kvm(12)] }),
        0x4B56_4D06 | 0x4B56_4D07 => needs("kvm_asyncpf_int", const { &[of_kvm(14)] }),
        0x4B56_4D08 => needs("kvm_migration_control", const { &[of_kvm(17)] }),
        0xC000_0080 => reports("EFER", 0),
        0xC000_0103 => needs(
            "TSC_AUX",
            const { &[of_amd(1, Edx, 27), in_leaf_7(Ecx, 22)] },
        ),
        0xC000_0104 => hidden("svm (TSC_RATIO)"),
        0xC000_0300..=0xC000_0302 => needs("perfmon_v2", const { &[of_amd(0x22, Eax, 0)] }),
        0xC001_0114 | 0xC001_0117 => hidden("svm"),
        0xC001_011F => needs("VIRT_SPEC_CTRL", const { &[of_amd(8, Ebx, 25)] }),
        0xC001_0200..=0xC001_020B => needs("perfctr_core", const { &[of_amd(1, Ecx, 23)] }),
        0xC001_1029 => reports("DE_CFG", DE_CFG_HARMLESS),
        _ => ("", Rule::State),
    }
}

fn needs(name: &'static str, any_of: &'static [Feature]) -> (&'static str, Rule) {
    (name, Rule::Needs(any_of))
}

fn reports(name: &'static str, harmless: u64) -> (&'static str, Rule) {
    (name, Rule::Reports { harmless })
}

fn hidden(name: &'static str) -> (&'static str, Rule) {
    (name, Rule::Hidden)
}

/// Whether the MSR is part of a CPU's state. Other MSRs are neither saved nor restored.
pub(in super::super) fn is_saved(index: u32) -> bool {
    !matches!(rule(index).1, Rule::Hidden | Rule::Ignored)
}

/// The values that the saved MSRs of a CPU are compared with.
pub(super) struct MsrValues<'a> {
    /// The MSRs that KVM lists.
    pub(super) known: &'a [u32],
    /// The values that a boot gives.
    pub(super) boot: BTreeMap<u32, u64>,
}

impl MsrValues<'_> {
    /// The saved MSRs whose value at a boot matters.
    pub(super) fn to_compare(saved: &[(u32, u64)]) -> Vec<u32> {
        let saved = saved.iter().filter(|(_, value)| *value != 0);
        let compared = saved.filter(|(index, _)| match rule(*index).1 {
            Rule::State | Rule::Ignored => false,
            Rule::Needs(_) | Rule::Reports { .. } | Rule::Hidden => true,
        });
        compared.map(|(index, _)| *index).collect()
    }

    pub(super) fn check(&self, state: &VcpuState) -> Result<(), Refusal> {
        let mut seen = BTreeSet::new();
        for &(index, value) in &state.msrs {
            if !seen.insert(index) {
                return Err(Refusal::invalid(format!("it has the MSR {index:#x} twice")));
            }
            self.check_one(index, value, state.cpuid())?;
        }
        Ok(())
    }

    fn check_one(&self, index: u32, value: u64, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Refusal> {
        let (name, rule) = rule(index);
        let boot = self.boot.get(&index).copied().unwrap_or(0);
        let excess = match rule {
            // An MSR that is not in use holds a zero.
            _ if value == 0 || value == boot => 0,
            Rule::Ignored => 0,
            Rule::State if self.known.contains(&index) => 0,
            Rule::Needs(any_of) if any_of.iter().any(|feature| feature.is_in(cpuid)) => 0,
            Rule::Reports { harmless } => value & !boot & !harmless,
            Rule::State | Rule::Needs(_) | Rule::Hidden => value,
        };
        match (excess, rule_names_bits(index)) {
            (0, _) => Ok(()),
            (excess, true) => Err(Refusal::Exceeds(bit_names(name, index, excess))),
            _ if name.is_empty() => Err(Refusal::exceeds(format!("the MSR {index:#x}"))),
            _ => Err(Refusal::exceeds(format!(
                "{name} (MSR {index:#x}, value {value:#x})"
            ))),
        }
    }
}

fn rule_names_bits(index: u32) -> bool {
    matches!(rule(index).1, Rule::Reports { .. })
}

fn bit_names(name: &str, index: u32, bits: u64) -> Vec<String> {
    let low = set_bits(bits as u32);
    let high = set_bits((bits >> 32) as u32).map(|bit| bit + 32);
    low.chain(high)
        .map(|bit| match (index, bit) {
            (0x3A, 1 | 2) => format!("vmx ({name} bit {bit})"),
            (0x3A, 17 | 18) => format!("sgx ({name} bit {bit})"),
            (0xC000_0080, 12) => format!("svm ({name} bit {bit})"),
            _ => format!("{name} bit {bit}"),
        })
        .collect()
}
