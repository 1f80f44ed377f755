//! A CPU as a boot makes it passes, and each way to exceed that is refused by its name.

use kvm_bindings::{kvm_lapic_state, kvm_xcr};
use proptest::prelude::*;

use super::*;

/// CPUs of the machine that is restored.
const COUNT: u8 = 2;
const MSRS: [u32; 7] = [0x10, 0x3A, 0x10A, 0x174, 0x277, 0x4B56_4D01, 0x4B56_4D04];

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    let indexed = matches!(function, 4 | 7 | 0xD);
    kvm_cpuid_entry2 {
        function,
        index,
        flags: if indexed {
            KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        } else {
            0
        },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// A host that has virtualisation, performance counters and AVX, and neither AVX-512 nor CET.
fn ceiling() -> CpuCeiling {
    let vendor = [b"Auth", b"enti", b"cAMD"].map(|part| u32::from_le_bytes(*part));
    let supported = [
        leaf(0, 0, [0x1C, vendor[0], vendor[2], vendor[1]]),
        leaf(1, 0, [0xA1_0F11, 0x0800, 0x1E20_0020, 0x078B_FBFF]),
        leaf(4, 0, [0x163, 0, 0, 0]),
        leaf(7, 0, [1, 0x0010_0181, 0x0000_0004, 0x2400_0000]),
        leaf(7, 1, [0, 0, 0, 0]),
        leaf(0xA, 0, [0x0730_0402, 0, 0, 0x603]),
        leaf(0xD, 0, [7, 0x340, 0x340, 0]),
        leaf(0xD, 1, [0xF, 0x340, 0, 0]),
        leaf(0xD, 2, [0x100, 0x240, 0, 0]),
        leaf(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D],
        ),
        leaf(0x4000_0001, 0, [0x0100_7EFB, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 0x0180_0397, 0x2DD3_FBFF]),
        leaf(0x8000_0007, 0, [0, 0, 0, 0x100]),
        leaf(0x8000_0008, 0, [0x3030, 0x0100_D005, 0x7001, 0]),
        leaf(0x8000_000A, 0, [1, 0x8000, 0, 0x1409]),
        leaf(0x8000_0021, 0, [0x204, 0, 0, 0]),
    ];
    CpuCeiling {
        supported: CpuId::from_entries(&supported).unwrap(),
        count: COUNT,
        msrs: MSRS.to_vec(),
    }
}

/// CPU `id` as a boot makes it.
fn booted(id: u8) -> VcpuState {
    let mut state = VcpuState::blank();
    state.cpuid = ceiling().cpuid(id);
    state.sregs.apic_base = 0xFEE0_0800 | if id == 0 { 0x100 } else { 0 };
    state.sregs.cr0 = 0x6000_0010;
    state.xcrs.nr_xcrs = 1;
    state.xcrs.xcrs[0].value = 1;
    state.xsave = vec![0; 1024];
    set_apic_id(&mut state.lapic, id);
    state
}

fn set_apic_id(lapic: &mut kvm_lapic_state, id: u8) {
    lapic.regs[0x23] = id as i8;
}

/// A boot's values: the host reports two capabilities.
fn boot_values(indices: &[u32]) -> Result<Vec<(u32, u64)>, VcpuError> {
    let value = |index: u32| if index == 0x10A { 0b11 } else { 0 };
    Ok(indices.iter().map(|&index| (index, value(index))).collect())
}

fn check(id: u8, state: &VcpuState) -> Result<(), Refusal> {
    let ceiling = ceiling();
    match ceiling.check(id, state, &ceiling.cpuid(id), boot_values) {
        Ok(()) => Ok(()),
        Err(VcpuError::Refused { vcpu, refusal }) if vcpu == id => Err(refusal),
        Err(other) => panic!("another error: {other}"),
    }
}

/// The reason why CPU 1 is refused after a change.
fn refusal_of(change: impl FnOnce(&mut VcpuState)) -> String {
    let mut state = booted(1);
    change(&mut state);
    check(1, &state).unwrap_err().to_string()
}

fn change_leaf(
    state: &mut VcpuState,
    function: u32,
    index: u32,
    change: impl FnOnce(&mut kvm_cpuid_entry2),
) {
    let entries = state.cpuid.iter_mut();
    let mut found = entries.filter(|it| it.function == function && it.index == index);
    match found.next() {
        Some(entry) => change(entry),
        None => {
            let mut entry = leaf(function, index, [0; 4]);
            change(&mut entry);
            state.cpuid.push(entry);
        }
    }
}

/// The reason why CPU 1 is refused whose leaf was changed.
fn refusal_of_leaf(
    function: u32,
    index: u32,
    change: impl FnOnce(&mut kvm_cpuid_entry2),
) -> String {
    refusal_of(|state| change_leaf(state, function, index, change))
}

#[test]
fn every_cpu_of_a_boot_stays_below_its_own_ceiling() {
    for id in 0..COUNT {
        assert_eq!(check(id, &booted(id)), Ok(()));
    }
}

#[test]
fn a_guest_may_have_set_what_its_features_let_it_set() {
    let mut state = booted(1);
    change_leaf(&mut state, 1, 0, |it| it.ecx |= OSXSAVE);
    change_leaf(&mut state, 0xD, 0, |it| it.ebx = 0x240);
    // Paging with SMEP, SMAP, FSGSBASE and OSXSAVE; long mode, NX and system calls.
    state.sregs.cr0 = 0x8005_0033;
    state.sregs.cr4 = 0x0035_06F0 & !(1 << 17);
    state.sregs.efer = 0xD01;
    state.sregs.apic_base |= 1 << 10;
    state.xcrs.xcrs[0].value = 7;
    state.xsave[128] = 7;
    state.msrs = vec![
        (0x10, 99),
        (0x174, 0x10),
        (0x277, 0x0007_0406_0007_0406),
        // Linux locks it at its start.
        (0x3A, 1),
        (0x10A, 0b01),
        (0x4B56_4D01, 0x1234_5001),
        // Not on this host, and not in use.
        (0x999, 0),
    ];
    assert_eq!(check(1, &state), Ok(()));
}

#[test]
fn a_guest_with_fewer_features_and_another_model_passes() {
    let mut state = booted(1);
    change_leaf(&mut state, 0, 0, |it| it.eax = 0xD);
    change_leaf(&mut state, 1, 0, |it| it.eax = 0x0080_0F12);
    change_leaf(&mut state, 7, 0, |it| it.ebx = 0);
    change_leaf(&mut state, 0x8000_0008, 0, |it| it.eax = 0x302B);
    state.cpuid.retain(|it| it.function != 0x8000_0021);
    state.cpuid.push(leaf(0x24, 0, [0; 4]));
    assert_eq!(check(1, &state), Ok(()));
}

#[test]
fn a_state_from_before_the_leaf_was_hidden_passes_and_more_than_the_host_has_does_not() {
    let once = |edx| {
        let mut state = booted(1);
        let nested = |it: &mut kvm_cpuid_entry2| (it.eax, it.ebx, it.edx) = (1, 0x8000, edx);
        change_leaf(&mut state, 0x8000_000A, 0, nested);
        check(1, &state)
    };
    assert_eq!(once(0x1409), Ok(()));
    let refused = once(0x0200_1409).unwrap_err().to_string();
    assert!(refused.contains("vnmi (8000000a.edx bit 25)"), "{refused}");
}

#[test]
fn features_that_a_boot_does_not_give_are_refused_by_name() {
    for (function, index, register, bit, name) in [
        (1, 0, Register::Ecx, 5, "vmx"),
        (0x8000_0001, 0, Register::Ecx, 2, "svm"),
        (0x8000_0001, 0, Register::Ecx, 22, "topoext"),
        (0x8000_0001, 0, Register::Ecx, 23, "perfctr_core"),
        (0x4000_0001, 0, Register::Eax, 6, "kvm_pv_eoi"),
        (7, 0, Register::Ebx, 16, "avx512f"),
        (7, 0, Register::Ecx, 7, "shstk"),
        (7, 1, Register::Eax, 5, "avx512_bf16"),
        (7, 2, Register::Edx, 4, "bhi_ctrl"),
        (0xA, 0, Register::Eax, 1, "a.eax bit 1"),
        (0xD, 0, Register::Eax, 18, "amx_tiledata"),
        (0xD, 1, Register::Eax, 4, "xfd"),
        (0xD, 1, Register::Ecx, 11, "cet_u"),
        (0x12, 0, Register::Eax, 0, "12.eax bit 0"),
        (0x19, 0, Register::Ebx, 0, "aeskle"),
        (0x8000_0008, 0, Register::Ebx, 25, "virt_ssbd"),
        (0x8000_0021, 0, Register::Eax, 8, "autoibrs"),
        (0x8000_0022, 0, Register::Eax, 0, "perfmon_v2"),
        (0x4000_0003, 0, Register::Eax, 5, "40000003.eax bit 5"),
        (0xC000_0001, 0, Register::Edx, 2, "c0000001.edx bit 2"),
    ] {
        let set = |it: &mut kvm_cpuid_entry2| match register {
            Register::Eax => it.eax |= 1 << bit,
            Register::Ebx => it.ebx |= 1 << bit,
            Register::Ecx => it.ecx |= 1 << bit,
            Register::Edx => it.edx |= 1 << bit,
        };
        let refusal = refusal_of_leaf(function, index, set);
        assert!(refusal.contains(name), "{name}: {refusal}");
    }
}

#[test]
fn all_features_over_the_ceiling_are_named_at_once() {
    let mut state = booted(1);
    change_leaf(&mut state, 1, 0, |it| it.ecx |= 1 << 5);
    change_leaf(&mut state, 7, 0, |it| it.ebx |= 1 << 16);
    let Err(Refusal::Exceeds(features)) = check(1, &state) else {
        panic!("it passed");
    };
    let expected = ["vmx (1.ecx bit 5)", "avx512f (7.ebx bit 16)"];
    assert_eq!(features, expected);
}

#[test]
fn sizes_and_address_widths_are_those_of_this_host() {
    let wider = refusal_of_leaf(0x8000_0008, 0, |it| it.eax = 0x3034);
    assert!(wider.contains("address widths"), "{wider}");
    let moved = refusal_of_leaf(0xD, 2, |it| it.ebx = 0x1000);
    assert!(moved.contains("leaf 0xd, index 2"), "{moved}");
    let other = refusal_of_leaf(0x4000_0000, 0, |it| it.ebx = 0x7263_694D);
    assert!(other.contains("leaf 0x40000000"), "{other}");
}

#[test]
fn a_cpu_in_anothers_place_is_refused() {
    let other = check(1, &booted(0)).unwrap_err().to_string();
    assert!(other.contains("not that of CPU 1 of 2"), "{other}");
    for change in [
        (|it: &mut kvm_cpuid_entry2| it.edx = 7) as fn(&mut kvm_cpuid_entry2),
        |it| it.ebx = 9,
    ] {
        let refusal = refusal_of_leaf(0xB, 1, change);
        assert!(refusal.contains("leaf 0xb, index 1"), "{refusal}");
    }
    let cores = refusal_of_leaf(0x8000_0008, 0, |it| it.ecx = 0x7001 | 63);
    assert!(cores.contains("leaf 0x80000008"), "{cores}");
    let package = refusal_of_leaf(4, 0, |it| it.eax |= 0xF << 26);
    assert!(package.contains("leaf 0x4"), "{package}");
}

#[test]
fn another_makers_cpu_is_refused_by_its_name() {
    let refusal = refusal_of_leaf(0, 0, |it| {
        (it.ebx, it.edx, it.ecx) = (0x756E_6547, 0x4965_6E69, 0x6C65_746E);
    });
    assert!(refusal.contains("GenuineIntel") && refusal.contains("AuthenticAMD"));
}

#[test]
fn a_leaf_cannot_hide_behind_another() {
    let twice = refusal_of(|state| state.cpuid.insert(0, leaf(1, 0, [0; 4])));
    assert!(twice.contains("twice"), "{twice}");
    // Without the flag, KVM would take it for every index.
    let shadow = refusal_of(|state| {
        let mut entry = leaf(7, 9, [0; 4]);
        entry.flags = 0;
        state.cpuid.insert(0, entry);
    });
    assert!(shadow.contains("leaf 0x7"), "{shadow}");
}

#[test]
fn msrs_that_turn_on_what_cpuid_lacks_are_refused_by_name() {
    for (index, value, name) in [
        (0xC000_0080, 1 << 12, "svm (EFER bit 12)"),
        (0x3A, 0b101, "vmx (IA32_FEATURE_CONTROL bit 2)"),
        (0x3A, 1 << 18, "sgx (IA32_FEATURE_CONTROL bit 18)"),
        (0x10A, 1 << 5, "IA32_ARCH_CAPABILITIES bit 5"),
        (0x480, 0x00DA_0400_0000_0004, "VMX"),
        (0x48B, 1, "VMX"),
        (0x345, 0x2000, "IA32_PERF_CAPABILITIES bit 13"),
        (0xCE, 1 << 31, "MSR_PLATFORM_INFO bit 31"),
        (0x186, 0x41_003C, "performance counters"),
        (0x570, 1, "Intel PT"),
        (0x6A2, 1, "control-flow enforcement"),
        (0x1C4, 1 << 18, "IA32_XFD"),
        (0x9E, 0x3_0000, "system management mode"),
        (0x4000_0001, 0x1001, "Hyper-V"),
        (0x4000_0080, 1, "Hyper-V"),
        (0x4B56_4D04, 0x1001, "kvm_pv_eoi"),
        (0xC001_0117, 0x5000, "svm"),
        (0xC000_0300, 1, "perfmon_v2"),
        // No KVM of this host lists it.
        (0x1234, 1, "the MSR 0x1234"),
    ] {
        let refusal = refusal_of(|state| state.msrs.push((index, value)));
        assert!(refusal.contains(name), "{index:#x}: {refusal}");
    }
    let twice = refusal_of(|state| state.msrs.extend([(0x174, 1), (0x174, 1)]));
    assert!(twice.contains("twice"), "{twice}");
}

#[test]
fn what_a_boot_hides_is_no_part_of_a_state() {
    for index in [0x480, 0x491, 0x4000_0001, 0x4000_0020, 0xC001_0117, 0x9E] {
        assert!(!is_saved_msr(index), "{index:#x}");
    }
    for index in [0x10, 0x3A, 0x10A, 0x174, 0x6E0, 0x4B56_4D01, 0xC000_0082] {
        assert!(is_saved_msr(index), "{index:#x}");
    }
    assert_eq!(ceiling().saved_msrs(), MSRS);
}

#[test]
fn control_registers_turn_on_nothing_that_cpuid_lacks() {
    for (bit, name) in [
        (13, "vmx (CR4 bit 13)"),
        (12, "la57 (CR4 bit 12)"),
        (22, "pku (CR4 bit 22)"),
        (23, "cet (CR4 bit 23)"),
        (28, "lam (CR4 bit 28)"),
        (32, "fred (CR4 bit 32)"),
        (60, "an unknown feature (CR4 bit 60)"),
    ] {
        let refusal = refusal_of(|state| state.sregs.cr4 |= 1 << bit);
        assert!(refusal.contains(name), "{refusal}");
    }
    for (bit, name) in [(12, "svm (EFER bit 12)"), (21, "autoibrs (EFER bit 21)")] {
        let refusal = refusal_of(|state| state.sregs.efer |= 1 << bit);
        assert!(refusal.contains(name), "{refusal}");
    }
    let reserved = refusal_of(|state| state.sregs.cr0 |= 1 << 40);
    assert!(reserved.contains("CR0"), "{reserved}");
}

#[test]
fn extended_state_is_that_of_the_components_in_cpuid() {
    let pkru = refusal_of(|state| state.xcrs.xcrs[0].value = 1 << 9 | 7);
    assert!(pkru.contains("pkru (d.eax bit 9) in XCR0"), "{pkru}");
    let tiles = refusal_of(|state| state.xsave[128] = 1 << 18);
    assert!(
        tiles.contains("amx_tiledata (d.eax bit 18) in xstate_bv"),
        "{tiles}"
    );
    let high = refusal_of(|state| state.xsave[129] = 1 << 30);
    assert!(high.contains("d.edx bit 30 in xstate_bv"), "{high}");
    let compacted = refusal_of(|state| state.xsave[131] = 1 << 31);
    assert!(compacted.contains("compacted"), "{compacted}");
    let other = refusal_of(|state| state.xcrs.xcrs[0].xcr = 1);
    assert!(other.contains("XCR0"), "{other}");
    let many = refusal_of(|state| state.xcrs.nr_xcrs = u32::MAX);
    assert!(many.contains("XCR0"), "{many}");
    let two = refusal_of(|state| {
        state.xcrs.nr_xcrs = 2;
        state.xcrs.xcrs[1] = kvm_xcr {
            value: 3,
            ..Default::default()
        };
    });
    assert!(two.contains("XCR0"), "{two}");
    let cut = refusal_of(|state| state.xsave.truncate(100));
    assert!(cut.contains("cut short"), "{cut}");
}

#[test]
fn a_local_apic_is_that_of_its_cpu_and_holds_only_interrupts() {
    let other = refusal_of(|state| set_apic_id(&mut state.lapic, 0));
    assert!(other.contains("has the id 0x0, and not 1"), "{other}");
    let moved = refusal_of(|state| state.sregs.apic_base = 0xD000_0800);
    assert!(moved.contains("APIC base"), "{moved}");
    let boot_cpu = refusal_of(|state| state.sregs.apic_base |= 1 << 8);
    assert!(boot_cpu.contains("APIC base"), "{boot_cpu}");
    for at in [0x100, 0x180, 0x200] {
        let exception = refusal_of(|state| state.lapic.regs[at + 1] = 0x40);
        assert!(exception.contains("exception"), "{exception}");
    }
}

#[test]
fn what_is_pending_is_what_a_cpu_can_have_pending() {
    let smm = refusal_of(|state| state.events.smi.smm = 1);
    assert!(smm.contains("system management mode"), "{smm}");
    for change in [
        (|it: &mut VcpuState| it.events.exception.nr = 32) as fn(&mut VcpuState),
        |it| it.events.sipi_vector = 0x100,
        |it| it.events.triple_fault.pending = 1,
    ] {
        let refusal = refusal_of(change);
        assert!(refusal.contains("pending events"), "{refusal}");
    }
    let state = refusal_of(|state| state.mp_state.mp_state = 9);
    assert!(state.contains("MP state is 9"), "{state}");
}

proptest! {
    /// Whatever passes has no bit of a feature word that a boot lacks.
    #[test]
    fn no_change_of_a_feature_word_gets_past(
        word in 0..features::WORDS.len(),
        flipped in any::<u32>(),
    ) {
        let word = &features::WORDS[word];
        let mut state = booted(1);
        let set = |it: &mut kvm_cpuid_entry2| match word.register {
            Register::Eax => it.eax ^= flipped,
            Register::Ebx => it.ebx ^= flipped,
            Register::Ecx => it.ecx ^= flipped,
            Register::Edx => it.edx ^= flipped,
        };
        change_leaf(&mut state, word.leaf, word.index, set);
        let boot = ceiling().cpuid(1);
        let of = |cpuid: &[kvm_cpuid_entry2]| {
            let found = cpuid.iter().find(|it| it.function == word.leaf && it.index == word.index);
            found.map_or(0, |it| word.register.of(it))
        };
        let exceeds = of(&state.cpuid) & !of(&boot) & !word.not_the_hosts != 0;
        let passed = check(1, &state).is_ok();
        prop_assert!(!(passed && exceeds), "{} {flipped:#x}", word.name);
    }
}
