//! Checks control registers, extended state, the local APIC and pending events against the CPUID
//! that was saved with them (which is checked against a boot's).

use kvm_bindings::{
    KVM_MP_STATE_SIPI_RECEIVED, kvm_cpuid_entry2, kvm_lapic_state, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};

use super::super::features::{self, Feature, Register};
use super::super::saved::VcpuState;
use super::Refusal;
use Register::{Eax, Ebx, Ecx, Edx};

/// A bit of a control register that turns a feature on.
struct ControlBit {
    bit: u32,
    name: &'static str,
    /// The features of which any lets a guest set the bit. The list is empty where every CPU has
    /// the bit.
    any_of: &'static [Feature],
}

const fn bit(bit: u32, name: &'static str, any_of: &'static [Feature]) -> ControlBit {
    ControlBit { bit, name, any_of }
}

const fn leaf_1(register: Register, bit: u32) -> Feature {
    Feature::new(1, 0, register, bit)
}

const fn leaf_7(register: Register, bit: u32) -> Feature {
    Feature::new(7, 0, register, bit)
}

/// Bits of CR4. The first eleven are older than long mode.
const CR4: [ControlBit; 25] = [
    bit(0, "vme", &[]),
    bit(1, "pvi", &[]),
    bit(2, "tsd", &[]),
    bit(3, "de", &[]),
    bit(4, "pse", &[]),
    bit(5, "pae", &[]),
    bit(6, "mce", &[]),
    bit(7, "pge", &[]),
    bit(8, "pce", &[]),
    bit(9, "osfxsr", &[]),
    bit(10, "osxmmexcpt", &[]),
    bit(11, "umip", &[leaf_7(Ecx, 2)]),
    bit(12, "la57", &[leaf_7(Ecx, 16)]),
    bit(13, "vmx", &[leaf_1(Ecx, 5)]),
    bit(14, "smx", &[leaf_1(Ecx, 6)]),
    bit(16, "fsgsbase", &[leaf_7(Ebx, 0)]),
    bit(17, "pcid", &[leaf_1(Ecx, 17)]),
    bit(18, "xsave", &[leaf_1(Ecx, 26)]),
    bit(20, "smep", &[leaf_7(Ebx, 7)]),
    bit(21, "smap", &[leaf_7(Ebx, 20)]),
    bit(22, "pku", &[leaf_7(Ecx, 3)]),
    bit(23, "cet", &[leaf_7(Ecx, 7), leaf_7(Edx, 20)]),
    bit(24, "pks", &[leaf_7(Ecx, 31)]),
    bit(28, "lam", &[Feature::new(7, 1, Eax, 26)]),
    bit(32, "fred", &[Feature::new(7, 1, Eax, 17)]),
];

const EFER: [ControlBit; 8] = [
    bit(0, "syscall", &[Feature::new(0x8000_0001, 0, Edx, 11)]),
    bit(8, "lm", &[Feature::new(0x8000_0001, 0, Edx, 29)]),
    bit(10, "lm", &[Feature::new(0x8000_0001, 0, Edx, 29)]),
    bit(11, "nx", &[Feature::new(0x8000_0001, 0, Edx, 20)]),
    bit(12, "svm", &[Feature::new(0x8000_0001, 0, Ecx, 2)]),
    bit(14, "fxsr_opt", &[Feature::new(0x8000_0001, 0, Edx, 25)]),
    bit(15, "tce", &[Feature::new(0x8000_0001, 0, Ecx, 17)]),
    bit(21, "autoibrs", &[Feature::new(0x8000_0021, 0, Eax, 8)]),
];

/// The bits of CR0 that are not reserved.
const CR0: u64 = 0xE005_003F;
/// IA32_APIC_BASE: where a boot has the local APIC, and the flags that a guest may find or set.
const APIC_ADDRESS: u64 = 0xFEE0_0000;
const APIC_IS_BOOT_CPU: u64 = 1 << 8;
const APIC_X2APIC: u64 = 1 << 10;
const APIC_ENABLED: u64 = 1 << 11;

/// Offsets in the local APIC's page.
const APIC_ID: usize = 0x20;
/// In service, trigger mode and request: 256 bits each, 32 in every 16 bytes.
const APIC_VECTORS: [usize; 3] = [0x100, 0x180, 0x200];
/// The vectors of exceptions, which are never interrupts.
const EXCEPTION_VECTORS: u32 = 0xFFFF;

/// Where the header of an XSAVE area begins, in words, and how long it is.
const XSAVE_HEADER: usize = 512 / 4;
const XSAVE_HEADER_WORDS: usize = 64 / 4;
/// The components that every CPU has.
const LEGACY_COMPONENTS: u64 = 3;

/// Checks all state of CPU `id` except CPUID and MSRs.
pub(super) fn check(id: u8, state: &VcpuState) -> Result<(), Refusal> {
    let cpuid = state.cpuid();
    check_control_registers(id, &state.sregs, cpuid)?;
    check_xcrs(&state.xcrs, cpuid)?;
    check_xsave(&state.xsave, cpuid)?;
    check_lapic(id, &state.lapic)?;
    check_events(&state.events)?;
    match state.mp_state.mp_state {
        0..=KVM_MP_STATE_SIPI_RECEIVED => Ok(()),
        other => Err(Refusal::invalid(format!("its MP state is {other}"))),
    }
}

fn check_control_registers(
    id: u8,
    sregs: &kvm_sregs,
    cpuid: &[kvm_cpuid_entry2],
) -> Result<(), Refusal> {
    check_bits("CR4", sregs.cr4, &CR4, cpuid)?;
    check_bits("EFER", sregs.efer, &EFER, cpuid)?;
    if sregs.cr0 & !CR0 != 0 || sregs.cr8 > 0xF {
        return Err(Refusal::invalid("it has reserved bits in CR0 or CR8"));
    }
    let flags = APIC_IS_BOOT_CPU | APIC_X2APIC | APIC_ENABLED;
    let is_boot_cpu = sregs.apic_base & APIC_IS_BOOT_CPU != 0;
    if sregs.apic_base & !flags != APIC_ADDRESS || is_boot_cpu != (id == 0) {
        let reason = format!(
            "its APIC base {:#x} is not that of CPU {id}",
            sregs.apic_base
        );
        return Err(Refusal::invalid(reason));
    }
    Ok(())
}

/// Refuses bits of a control register whose features the CPU lacks, and those that are not known.
fn check_bits(
    name: &str,
    value: u64,
    known: &[ControlBit],
    cpuid: &[kvm_cpuid_entry2],
) -> Result<(), Refusal> {
    for number in (0..64).filter(|number| value >> number & 1 == 1) {
        let known = known.iter().find(|known| known.bit == number);
        let allowed = known.is_some_and(|known| {
            known.any_of.is_empty() || known.any_of.iter().any(|feature| feature.is_in(cpuid))
        });
        if !allowed {
            let feature = known.map_or("an unknown feature", |known| known.name);
            return Err(Refusal::exceeds(format!("{feature} ({name} bit {number})")));
        }
    }
    Ok(())
}

/// The state components that the CPU has by leaf 0xD.
fn components(cpuid: &[kvm_cpuid_entry2]) -> u64 {
    let leaf = cpuid.iter().find(|it| it.function == 0xD && it.index == 0);
    let given = leaf.map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
    given | LEGACY_COMPONENTS
}

fn check_xcrs(xcrs: &kvm_xcrs, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Refusal> {
    let count = xcrs.nr_xcrs as usize;
    let given = xcrs.xcrs.get(..count);
    let only_xcr0 = given.is_some_and(|given| given.iter().all(|xcr| xcr.xcr == 0));
    if !only_xcr0 || count > 1 || xcrs.flags != 0 {
        let reason = "it has extended control registers other than XCR0";
        return Err(Refusal::invalid(reason));
    }
    match given.and_then(<[_]>::first) {
        Some(xcr0) => check_components("XCR0", xcr0.value, cpuid),
        None => Ok(()),
    }
}

/// KVM keeps components in the area that XCR0 no longer has, so the limit is the components that
/// the CPU has, as it is for KVM.
fn check_xsave(words: &[u32], cpuid: &[kvm_cpuid_entry2]) -> Result<(), Refusal> {
    let header = words
        .get(XSAVE_HEADER..XSAVE_HEADER + XSAVE_HEADER_WORDS)
        .ok_or_else(|| Refusal::invalid("its extended state is cut short"))?;
    let (in_use, rest) = header.split_at(2);
    if rest.iter().any(|word| *word != 0) {
        let reason = "its extended state is in a compacted or unknown format";
        return Err(Refusal::invalid(reason));
    }
    let in_use = u64::from(in_use[1]) << 32 | u64::from(in_use[0]);
    check_components("xstate_bv", in_use, cpuid)
}

fn check_components(name: &str, value: u64, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Refusal> {
    let excess = value & !components(cpuid);
    if excess == 0 {
        return Ok(());
    }
    let mut names = features::names(0xD, 0, Eax, excess as u32);
    names.extend(features::names(0xD, 0, Edx, (excess >> 32) as u32));
    let names = names
        .into_iter()
        .map(|feature| format!("{feature} in {name}"));
    Err(Refusal::Exceeds(names.collect()))
}

fn check_lapic(id: u8, lapic: &kvm_lapic_state) -> Result<(), Refusal> {
    // KVM reads and writes the id in this place in both modes, unless it is asked for another.
    let apic_id = apic_register(lapic, APIC_ID);
    if apic_id != u32::from(id) << 24 {
        let reason = format!(
            "its local APIC has the id {:#x}, and not {id}",
            apic_id >> 24
        );
        return Err(Refusal::invalid(reason));
    }
    let exceptions = APIC_VECTORS
        .iter()
        .find(|&&at| apic_register(lapic, at) & EXCEPTION_VECTORS != 0);
    match exceptions {
        Some(at) => Err(Refusal::invalid(format!(
            "its local APIC has an exception as an interrupt (register {at:#x})"
        ))),
        None => Ok(()),
    }
}

fn apic_register(lapic: &kvm_lapic_state, at: usize) -> u32 {
    let bytes = lapic.regs[at..at + 4].iter().rev();
    bytes.fold(0, |value, &byte| value << 8 | u32::from(byte as u8))
}

fn check_events(events: &kvm_vcpu_events) -> Result<(), Refusal> {
    let in_smm = events.smi.smm != 0 || events.smi.pending != 0 || events.smi.smm_inside_nmi != 0;
    if in_smm {
        return Err(Refusal::exceeds("system management mode"));
    }
    if events.exception.nr > 31 || events.sipi_vector > 0xFF || events.triple_fault.pending != 0 {
        return Err(Refusal::invalid("its pending events are none of a CPU's"));
    }
    Ok(())
}
