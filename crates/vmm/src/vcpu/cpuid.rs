//! The CPUID of each CPU: the host's features as KVM offers them, with this machine's topology.
//!
//! Source: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1 ECX: the TSC-deadline timer, which KVM's LAPIC has but does not report by itself.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: several logical processors in the package.
const HTT: u32 = 1 << 28;
/// Leaf 1 ECX and leaf 0x8000_0001 ECX: Intel's and AMD's virtualisation. Guests get neither,
/// because it would add state to save and a larger surface to attack.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
/// Leaf 0x8000_0001 ECX: AMD's own topology leaves, which are not filled.
const AMD_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// KVM's leaf, EAX: the end of an interrupt told through memory. With it one of some thirty clones
/// stopped getting interrupts on an emulated host (and so did QEMU's guests there): in 90 forks
/// without it none did. It saves exits only on hosts without a virtual APIC.
const KVM_PV_EOI: u32 = 1 << 6;
const AMD_CORE_PERFORMANCE: u32 = 1 << 23 | 1 << 24;
/// The leaves of the extended topology, which describe this machine and not the host.
pub(super) const TOPOLOGY_LEAVES: [u32; 2] = [0xB, 0x1F];
/// Leaves that are all zero for guests: the performance counters of Intel and AMD (a clone may run
/// on a host with others), and AMD's nested virtualisation.
const HIDDEN_LEAVES: [u32; 3] = [0xA, 0x8000_000A, 0x8000_0022];
/// Hidden leaves that guests could read until they were hidden, and that states of that time hold.
/// They mean nothing without the features of other leaves that no guest was ever given.
pub(super) const ONCE_SHOWN_LEAVES: [u32; 2] = [0x8000_000A, 0x8000_0022];

/// The CPUID that a boot on a host with `supported` (`KVM_GET_SUPPORTED_CPUID`) gives CPU `id` of
/// `count`. It is also the ceiling of the features that a saved CPU may have on this host.
///
/// The topology is one package of single-threaded cores: the host decides where they really run.
pub(super) fn for_vcpu(supported: &CpuId, id: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !TOPOLOGY_LEAVES.contains(&entry.function))
        .copied()
        .collect();
    for entry in &mut entries {
        mask(entry);
        set_topology(entry, id, count);
    }
    entries.extend(
        TOPOLOGY_LEAVES
            .into_iter()
            .flat_map(|function| topology(function, id, count)),
    );
    entries
}

/// Hides the features that no guest gets, and reports those that KVM has without the host's CPU.
fn mask(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => entry.ecx = entry.ecx & !VMX | TSC_DEADLINE | HYPERVISOR,
        0x4000_0001 => entry.eax &= !KVM_PV_EOI,
        0x8000_0001 => {
            entry.ecx &= !(SVM | AMD_TOPOLOGY_EXTENSIONS | AMD_CORE_PERFORMANCE);
        }
        function if HIDDEN_LEAVES.contains(&function) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

/// Sets the parts of a leaf that depend on CPU `id` and the `count` of its machine.
pub(super) fn set_topology(entry: &mut kvm_cpuid_entry2, id: u8, count: u8) {
    let cpus = u32::from(count);
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0x0000_FFFF | cpus << 16 | u32::from(id) << 24;
            entry.edx = match count > 1 {
                true => entry.edx | HTT,
                false => entry.edx & !HTT,
            };
        }
        // Cores per package (bits 26 to 31) and CPUs per cache (14 to 25), less one each.
        4 if entry.eax & 0x1F != 0 => {
            let shared = if entry.eax >> 5 & 7 >= 3 { cpus - 1 } else { 0 };
            entry.eax = entry.eax & 0x3FFF | shared << 14 | (cpus - 1).min(63) << 26;
        }
        // Cores, less one, and the width of the APIC id.
        0x8000_0008 => {
            entry.ecx = entry.ecx & !0xF0FF | (cpus - 1) | apic_id_bits(count) << 12;
        }
        _ => {}
    }
}

fn apic_id_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// The two levels of an extended topology leaf, and its end.
fn topology(function: u32, id: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, cpus: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: cpus,
        ecx: index | kind << 8,
        edx: u32::from(id),
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, apic_id_bits(count), u32::from(count), 2),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(cpuid: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = |entry: &&kvm_cpuid_entry2| entry.function == function && entry.index == index;
        *cpuid.iter().find(found).unwrap()
    }

    fn supported() -> CpuId {
        let entry = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        CpuId::from_entries(&[
            entry(1, 0),
            entry(4, 0x121),
            entry(0xA, 7),
            entry(0x8000_0008, 0),
        ])
        .unwrap()
    }

    #[test]
    fn every_cpu_has_its_own_id_in_every_leaf() {
        let cpuid = for_vcpu(&supported(), 5, 6);
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, 5);
        for function in [0xB, 0x1F] {
            assert_eq!(leaf(&cpuid, function, 0).edx, 5);
            assert_eq!(
                (leaf(&cpuid, function, 1).eax, leaf(&cpuid, function, 1).ebx),
                (3, 6)
            );
        }
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 5 | 3 << 12);
    }

    #[test]
    fn guests_are_offered_no_virtualisation() {
        let entry = |function, ecx| kvm_cpuid_entry2 {
            function,
            ecx,
            ..Default::default()
        };
        let host = CpuId::from_entries(&[
            entry(1, u32::MAX),
            entry(0x8000_0001, u32::MAX),
            entry(0x8000_000A, u32::MAX),
        ])
        .unwrap();
        let cpuid = for_vcpu(&host, 0, 1);
        assert_eq!(leaf(&cpuid, 1, 0).ecx & VMX, 0);
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & SVM, 0);
        assert_eq!(leaf(&cpuid, 0x8000_000A, 0).ecx, 0);
    }

    #[test]
    fn the_deadline_timer_is_announced_and_performance_counters_are_not() {
        let cpuid = for_vcpu(&supported(), 0, 1);
        assert_ne!(leaf(&cpuid, 1, 0).ecx & TSC_DEADLINE, 0);
        assert_eq!(leaf(&cpuid, 0xA, 0).eax, 0);
    }
}
