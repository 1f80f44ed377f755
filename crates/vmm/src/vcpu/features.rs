//! The feature bits of CPUID, by the names that programs and `/proc/cpuinfo` give them.
//!
//! Source: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of CPUID's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    pub(crate) const ALL: [Self; 4] = [Eax, Ebx, Ecx, Edx];

    pub(crate) fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Eax => "eax",
            Ebx => "ebx",
            Ecx => "ecx",
            Edx => "edx",
        }
    }
}

/// A register of a CPUID leaf, of which each bit is a feature.
pub(crate) struct Word {
    /// The word's name in a template's manifest.
    pub(crate) name: &'static str,
    pub(crate) leaf: u32,
    pub(crate) index: u32,
    pub(crate) register: Register,
    /// Bits that do not depend on the host's CPU: KVM, the number of CPUs or the guest's own
    /// settings decide them.
    pub(crate) not_the_hosts: u32,
    /// The names of the bits, from bit 0; `-` where one has none.
    bits: &'static str,
}

const fn word(
    name: &'static str,
    (leaf, index): (u32, u32),
    register: Register,
    bits: &'static str,
) -> Word {
    Word {
        name,
        leaf,
        index,
        register,
        not_the_hosts: 0,
        bits,
    }
}

impl Word {
    const fn except(mut self, not_the_hosts: u32) -> Self {
        self.not_the_hosts = not_the_hosts;
        self
    }

    fn bit_name(&self, bit: u32) -> Option<&'static str> {
        let name = self.bits.split_whitespace().nth(bit as usize)?;
        (name != "-").then_some(name)
    }
}

/// The components of the extended state, by their bits in XCR0 and IA32_XSS.
const STATE_COMPONENTS: &str = "x87 sse avx mpx_bndregs mpx_bndcsr avx512_opmask avx512_zmm_hi256 \
     avx512_hi16_zmm pt pkru pasid cet_u cet_s hdc uintr lbr hwp amx_tilecfg amx_tiledata apx";

/// Every word of features that a guest may use and hosts differ in.
pub(crate) const WORDS: [Word; 24] = [
    // Not the host's: the TSC-deadline timer, x2APIC, OSXSAVE, hypervisor.
    word(
        "1.ecx",
        (1, 0),
        Ecx,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cnxt_id sdbg fma cx16 xtpr \
         pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave \
         avx f16c rdrand hypervisor",
    )
    .except(1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
    // Not the host's: hyper-threading, which is the number of CPUs.
    word(
        "1.edx",
        (1, 0),
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 psn clfsh - ds \
         acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    )
    .except(1 << 28),
    word(
        "7.ebx",
        (7, 0),
        Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
         zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt \
         clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    // Not the host's: OSPKE.
    word(
        "7.ecx",
        (7, 0),
        Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
         avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid kl \
         bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    )
    .except(1 << 4),
    word(
        "7.edx",
        (7, 0),
        Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl \
         md_clear rtm_always_abort - tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr \
         ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d \
         arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    word(
        "7.1.eax",
        (7, 1),
        Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs \
         fsrc - - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist - - \
         invd_disable movrs",
    ),
    word("7.1.ebx", (7, 1), Ebx, "ppin"),
    word("7.1.ecx", (7, 1), Ecx, "- - - - - msr_imm"),
    word(
        "7.1.edx",
        (7, 1),
        Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr \
         prefetchiti user_msr - uiret_uif cet_sss avx10 - apx_f",
    ),
    word(
        "7.2.edx",
        (7, 2),
        Edx,
        "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    word("d.eax", (0xD, 0), Eax, STATE_COMPONENTS),
    word("d.edx", (0xD, 0), Edx, ""),
    word(
        "d.1.eax",
        (0xD, 1),
        Eax,
        "xsaveopt xsavec xgetbv1 xsaves xfd",
    ),
    word("d.1.ecx", (0xD, 1), Ecx, STATE_COMPONENTS),
    word("d.1.edx", (0xD, 1), Edx, ""),
    word(
        "19.eax",
        (0x19, 0),
        Eax,
        "kl_cpl0 kl_no_encrypt kl_no_decrypt",
    ),
    word("19.ebx", (0x19, 0), Ebx, "aeskle - aes_wide_kl - kl_backup"),
    word("19.ecx", (0x19, 0), Ecx, "kl_no_backup kl_random_key"),
    word(
        "40000001.eax",
        (0x4000_0001, 0),
        Eax,
        "kvmclock kvm_nopiodelay kvm_mmu_op kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control \
         kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range \
         kvm_migration_control - - - - - - kvmclock_stable",
    ),
    word(
        "80000001.ecx",
        (0x8000_0001, 0),
        Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
         xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext \
         ptsc perfctr_llc mwaitx addr_mask_ext",
    ),
    word(
        "80000001.edx",
        (0x8000_0001, 0),
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - \
         mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(
        "80000007.edx",
        (0x8000_0007, 0),
        Edx,
        "ts fid vid ttp tm stc 100mhzsteps hw_pstate invtsc cpb eff_freq_ro",
    ),
    word(
        "80000008.ebx",
        (0x8000_0008, 0),
        Ebx,
        "clzero irperf xsaveerptr invlpgb rdpru - mba - mcommit wbnoinvd - - ibpb int_wbinvd ibrs \
         stibp ibrs_always_on stibp_always_on ibrs_preferred ibrs_same_mode efer_lmsle_mbz \
         invlpgb_nested - ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret",
    ),
    word(
        "80000021.eax",
        (0x8000_0021, 0),
        Eax,
        "no_nested_data_bp fs_gs_base_ns lfence_rdtsc smm_pgcfg_lock - - null_sel_clr_base \
         upper_address_ignore autoibrs no_smm_ctl_msr fsrs fsrc - prefetch_ctl_msr - - - \
         user_cpuid_mbz - - prefetchi - - - - - - sbpb ibpb_brtype srso_no",
    ),
];

/// Words whose bits have names although a boot gives none of them. They are named only when a saved
/// CPU is refused.
const REFUSED_WORDS: [Word; 2] = [
    word(
        "8000000a.edx",
        (0x8000_000A, 0),
        Edx,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - \
         pausefilter - pfthreshold avic - v_vmsave_vmload vgif gmet x2avic sss_check \
         v_spec_ctrl - - - - vnmi",
    ),
    word(
        "80000022.eax",
        (0x8000_0022, 0),
        Eax,
        "perfmon_v2 lbr_v2 lbr_pmc_freeze",
    ),
];

/// A feature, as in `svm (80000001.ecx bit 2)`.
pub(crate) fn name_in(word: &str, bit: u32) -> String {
    let known = WORDS.iter().chain(&REFUSED_WORDS);
    let known = known
        .filter(|known| known.name == word)
        .find_map(|known| known.bit_name(bit));
    match known {
        Some(name) => format!("{name} ({word} bit {bit})"),
        None => format!("{word} bit {bit}"),
    }
}

/// The names of the features in `bits` of a register of a leaf.
pub(crate) fn names(leaf: u32, index: u32, register: Register, bits: u32) -> Vec<String> {
    if bits == 0 {
        return Vec::new();
    }
    let word = match index {
        0 => format!("{leaf:x}.{}", register.name()),
        _ => format!("{leaf:x}.{index:x}.{}", register.name()),
    };
    set_bits(bits).map(|bit| name_in(&word, bit)).collect()
}

pub(crate) fn set_bits(bits: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |bit| bits >> bit & 1 == 1)
}

/// A feature that a register or an MSR depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Feature {
    leaf: u32,
    index: u32,
    register: Register,
    bit: u32,
}

impl Feature {
    pub(super) const fn new(leaf: u32, index: u32, register: Register, bit: u32) -> Self {
        Self {
            leaf,
            index,
            register,
            bit,
        }
    }

    /// Whether a CPU with this CPUID has the feature.
    pub(super) fn is_in(self, cpuid: &[kvm_cpuid_entry2]) -> bool {
        let entry = cpuid
            .iter()
            .find(|entry| entry.function == self.leaf && entry.index == self.index);
        entry.is_some_and(|entry| self.register.of(entry) >> self.bit & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_the_names_that_the_field_gives_them() {
        for (leaf, index, register, bit, name) in [
            (1, 0, Ecx, 5, "vmx (1.ecx bit 5)"),
            (1, 0, Ecx, 31, "hypervisor (1.ecx bit 31)"),
            (1, 0, Edx, 31, "pbe (1.edx bit 31)"),
            (7, 0, Ebx, 31, "avx512vl (7.ebx bit 31)"),
            (7, 0, Ecx, 22, "rdpid (7.ecx bit 22)"),
            (7, 0, Ecx, 31, "pks (7.ecx bit 31)"),
            (7, 0, Edx, 31, "spec_ctrl_ssbd (7.edx bit 31)"),
            (7, 1, Eax, 26, "lam (7.1.eax bit 26)"),
            (7, 1, Edx, 19, "avx10 (7.1.edx bit 19)"),
            (0xD, 0, Eax, 18, "amx_tiledata (d.eax bit 18)"),
            (0x19, 0, Ebx, 0, "aeskle (19.ebx bit 0)"),
            (
                0x4000_0001,
                0,
                Eax,
                24,
                "kvmclock_stable (40000001.eax bit 24)",
            ),
            (0x8000_0001, 0, Ecx, 2, "svm (80000001.ecx bit 2)"),
            (0x8000_0001, 0, Edx, 31, "3dnow (80000001.edx bit 31)"),
            (0x8000_0008, 0, Ebx, 25, "virt_ssbd (80000008.ebx bit 25)"),
            (0x8000_000A, 0, Edx, 25, "vnmi (8000000a.edx bit 25)"),
            (0x8000_0021, 0, Eax, 8, "autoibrs (80000021.eax bit 8)"),
            (0x8000_0021, 0, Eax, 29, "srso_no (80000021.eax bit 29)"),
            (0x12, 0, Eax, 0, "12.eax bit 0"),
        ] {
            assert_eq!(names(leaf, index, register, 1 << bit), [name]);
        }
    }

    #[test]
    fn every_word_is_named_after_its_leaf_and_register() {
        for word in WORDS.iter().chain(&REFUSED_WORDS) {
            let name = names(word.leaf, word.index, word.register, 1).remove(0);
            assert!(name.contains(&format!("{} bit 0", word.name)), "{name}");
            assert!(word.bits.split_whitespace().count() <= 32, "{}", word.name);
        }
    }
}
