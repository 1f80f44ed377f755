//! The whole state of a CPU, and how it is saved and restored.
//!
//! A clone only runs if all of it is restored: every MSR that KVM lists (without them the first
//! system call fails), the LAPIC (without it no timer fires), and the extended state in KVM's own
//! size. The order of restoring matters.
//!
//! Source: Linux `Documentation/virt/kvm/api.rst`.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuFd};

use super::VcpuError;
use super::ceiling::{CpuCeiling, is_saved_msr};
use super::saved::{MSR_TSC, VcpuState};

/// `IA32_TSC_DEADLINE`.
const MSR_TSC_DEADLINE: u32 = 0x6E0;
/// KVM's switch of asynchronous page faults.
const MSR_KVM_ASYNC_PF_EN: u32 = 0x4B56_4D02;
/// The number of MSRs in one call. KVM takes at most 256.
const MSR_BATCH: usize = 128;

/// The format of a CPU's state on this host, which is the same for all CPUs of a machine.
pub struct StateFormat {
    msr_indices: Vec<u32>,
    xsave_bytes: usize,
}

impl StateFormat {
    /// The format for CPUs below this ceiling, with the size of their extended state.
    pub fn new(ceiling: &CpuCeiling, xsave_bytes: i32) -> Self {
        // Hosts older than XSAVE2 have the fixed size of `kvm_xsave`.
        let xsave_bytes = usize::try_from(xsave_bytes).unwrap_or(0).max(4096);
        Self {
            msr_indices: ceiling.saved_msrs(),
            xsave_bytes,
        }
    }

    /// The size of the extended state in bytes, from a VM's capability.
    pub fn xsave_capability(vm: &kvm_ioctls::VmFd) -> i32 {
        vm.check_extension_int(Cap::Xsave2)
    }

    fn xsave(&self) -> Result<Xsave, VcpuError> {
        let extra_words = (self.xsave_bytes - 4096) / size_of::<u32>();
        Xsave::new(extra_words).map_err(|_| VcpuError::Corrupt("extended state too large"))
    }
}

/// Reads the whole state of a CPU that is not running.
pub(super) fn save(vcpu: &VcpuFd, format: &StateFormat) -> Result<VcpuState, VcpuError> {
    let kvm = VcpuError::kvm;
    // First, because reading it lets KVM finish what it has pending for the other registers.
    let mp_state = vcpu.get_mp_state().map_err(kvm("read the MP state"))?;
    let mut xsave = format.xsave()?;
    // SAFETY: `xsave` was made with the size that KVM names for this VM (KVM_CAP_XSAVE2), so KVM
    // writes within it.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(kvm("read the extended state"))?;
    let cpuid = cpuid_of(vcpu)?;
    let lapic = vcpu.get_lapic().map_err(kvm("read the local APIC"))?;
    let mut msrs = read_msrs(vcpu, &format.msr_indices)?;
    repair_deadline(&mut msrs, &lapic);
    Ok(VcpuState {
        cpuid: cpuid.as_slice().to_vec(),
        regs: vcpu.get_regs().map_err(kvm("read the registers"))?,
        sregs: vcpu.get_sregs().map_err(kvm("read the system registers"))?,
        xcrs: vcpu
            .get_xcrs()
            .map_err(kvm("read the extended control registers"))?,
        xsave: xsave_words(&xsave),
        lapic,
        msrs,
        events: vcpu.get_vcpu_events().map_err(kvm("read pending events"))?,
        debug_registers: vcpu
            .get_debug_regs()
            .map_err(kvm("read the debug registers"))?,
        mp_state,
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
    })
}

/// The CPUID that a CPU has now.
pub(crate) fn cpuid_of(vcpu: &VcpuFd) -> Result<CpuId, VcpuError> {
    vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(VcpuError::kvm("read CPUID"))
}

/// Checks, without changing anything, that a saved state can be put into CPU `id`: that it does not
/// exceed the present CPU, and, if that `has_run`, is of the same CPU, since KVM takes no other
/// CPUID then.
pub(super) fn check(
    vcpu: &VcpuFd,
    id: u8,
    state: &VcpuState,
    has_run: bool,
    (format, ceiling): (&StateFormat, &CpuCeiling),
) -> Result<(), VcpuError> {
    let present = cpuid_of(vcpu)?;
    ceiling.check(id, state, present.as_slice(), |indices| {
        read_msrs(vcpu, indices)
    })?;
    if has_run {
        ceiling.check_same(id, state, present.as_slice())?;
    }
    xsave_from_words(&state.xsave, format).map(drop)
}

/// Puts a saved state that was checked into a CPU that has not run. CPUID comes first: it decides
/// what the others may hold (since Linux 6.13, MSRs, too).
pub(super) fn restore(
    vcpu: &VcpuFd,
    state: &VcpuState,
    format: &StateFormat,
) -> Result<(), VcpuError> {
    let cpuid = CpuId::from_entries(&state.cpuid)
        .map_err(|_| VcpuError::Corrupt("too many CPUID entries"))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(VcpuError::kvm("set CPUID"))?;
    set_tsc_frequency(vcpu, state.tsc_khz)?;
    put(vcpu, state, format)
}

/// Puts a saved state that was checked into a CPU that has run.
///
/// What KVM keeps beside the registers is dropped first: a pending INIT or start-up, and the
/// notifications of asynchronous page faults, which are switched off for that. The rest is replaced
/// with the registers: a timer with the local APIC, events that are pending with the events.
pub(super) fn restore_in_place(
    vcpu: &VcpuFd,
    state: &VcpuState,
    format: &StateFormat,
) -> Result<(), VcpuError> {
    // KVM handles a pending INIT or start-up first, so that it does not reach the CPU later.
    vcpu.get_mp_state()
        .map_err(VcpuError::kvm("read the MP state"))?;
    if format.msr_indices.contains(&MSR_KVM_ASYNC_PF_EN) {
        write_msrs(vcpu, &[(MSR_KVM_ASYNC_PF_EN, 0)])?;
    }
    set_tsc_frequency(vcpu, state.tsc_khz)?;
    put(vcpu, state, format)
}

/// Puts a CPU that is not running back to `power_on`, its state when it was new. Its identity
/// (CPUID and the MSRs that report it) stays, and its time-stamp counter runs on, as a reset does
/// not stop it. KVM takes no other CPUID once a CPU has run.
pub(super) fn reset(
    vcpu: &VcpuFd,
    power_on: &VcpuState,
    format: &StateFormat,
) -> Result<(), VcpuError> {
    // KVM handles a pending INIT or start-up first, so that it does not reach the new CPU.
    vcpu.get_mp_state()
        .map_err(VcpuError::kvm("read the MP state"))?;
    put(vcpu, power_on, format)
}

impl VcpuState {
    /// The part of a new CPU's state that [`reset`] needs.
    pub(super) fn into_power_on(mut self) -> Self {
        self.cpuid = Vec::new();
        self.msrs
            .retain(|&(index, _)| index != MSR_TSC && !is_host_owned(index));
        self.msrs.shrink_to_fit();
        self
    }
}

/// Restores everything that a CPU changes while it runs.
///
/// The order matters: the system registers (with the APIC base) come before the LAPIC, the LAPIC
/// before the deadline MSR that arms its timer, pending events after all that could raise one, and
/// the MP state last.
fn put(vcpu: &VcpuFd, state: &VcpuState, format: &StateFormat) -> Result<(), VcpuError> {
    let kvm = VcpuError::kvm;
    vcpu.set_sregs(&state.sregs)
        .map_err(kvm("set the system registers"))?;
    vcpu.set_xcrs(&state.xcrs)
        .map_err(kvm("set the extended control registers"))?;
    let xsave = xsave_from_words(&state.xsave, format)?;
    // SAFETY: `xsave` was made with the size that KVM names for this VM (KVM_CAP_XSAVE2), so KVM
    // reads within it; its content is validated by KVM.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(kvm("set the extended state"))?;
    vcpu.set_regs(&state.regs)
        .map_err(kvm("set the registers"))?;
    vcpu.set_lapic(&state.lapic)
        .map_err(kvm("set the local APIC"))?;
    write_msrs(vcpu, &state.msrs)?;
    vcpu.set_debug_regs(&state.debug_registers)
        .map_err(kvm("set the debug registers"))?;
    vcpu.set_vcpu_events(&state.events)
        .map_err(kvm("set pending events"))?;
    // The guest's watchdog must not take the time between save and restore for a hung CPU. KVM
    // refuses this for a guest that does not use kvmclock, which needs it not.
    let _ = vcpu.kvmclock_ctrl();
    vcpu.set_mp_state(state.mp_state)
        .map_err(kvm("set the MP state"))
}

/// A host whose TSC cannot be scaled takes a state only of its own frequency.
fn set_tsc_frequency(vcpu: &VcpuFd, saved_khz: u32) -> Result<(), VcpuError> {
    let mine = vcpu.get_tsc_khz().unwrap_or(0);
    // Measured frequencies differ a little from boot to boot; KVM itself tolerates 250 ppm.
    if saved_khz == 0 || u64::from(mine.abs_diff(saved_khz)) * 4000 <= u64::from(saved_khz) {
        return Ok(());
    }
    vcpu.set_tsc_khz(saved_khz)
        .map_err(VcpuError::kvm("set the TSC's frequency"))
}

/// Sets the time-stamp counter of a CPU that is not running.
pub(super) fn set_tsc(vcpu: &VcpuFd, tsc: u64) -> Result<(), VcpuError> {
    write_msrs(vcpu, &[(MSR_TSC, tsc)])
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, VcpuError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let entries: Vec<_> = batch
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| VcpuError::Corrupt("too many MSRs"))?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(VcpuError::kvm("read the MSRs"))?;
        values.extend(
            msrs.as_slice()[..read]
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
        // KVM stops at the first MSR that this CPU does not have, which is then left out.
        rest = &rest[if read < batch.len() { read + 1 } else { read }..];
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), VcpuError> {
    // The TSC comes before everything that is relative to it, and the deadline after it and the
    // LAPIC.
    let order = |&(index, _): &(u32, u64)| match index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    };
    // States of former versions have those that a boot hides, too.
    let values = values.iter().filter(|(index, _)| is_saved_msr(*index));
    let mut values: Vec<_> = values.copied().collect();
    values.sort_by_key(order);
    let mut rest = values.as_slice();
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let entries: Vec<_> = batch
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| VcpuError::Corrupt("too many MSRs"))?;
        let written = vcpu
            .set_msrs(&msrs)
            .map_err(VcpuError::kvm("set the MSRs"))?;
        if written < batch.len() {
            let (index, data) = batch[written];
            // Many MSRs can be read but take only the value that they have. A value that the guest
            // has set must not be lost, so a refusal is an error unless the value is zero.
            if data != 0 && !is_host_owned(index) {
                return Err(VcpuError::MsrRefused { index, data });
            }
            tracing::debug!(index, data, "MSR not restored");
        }
        rest = &rest[if written < batch.len() {
            written + 1
        } else {
            written
        }..];
    }
    Ok(())
}

/// MSRs that report what the host's CPU is: readable, and writable only with the same value.
fn is_host_owned(index: u32) -> bool {
    matches!(index, 0x3A | 0x8B | 0xCE | 0x10A | 0x345 | 0xC001_1029)
}

/// A deadline that passed while KVM saved it reads as 0, and the timer would never fire again. It
/// is made to fire at once instead. The LAPIC's timer register (offset 0x320) tells whether the
/// guest uses deadlines (bits 17 and 18) and wants them (bit 16 masks).
fn repair_deadline(msrs: &mut [(u32, u64)], lapic: &kvm_lapic_state) {
    let timer = lapic.regs[0x320..0x324].iter().rev();
    let timer = timer.fold(0u32, |value, &byte| value << 8 | u32::from(byte as u8));
    let deadline_mode = timer >> 17 & 3 == 2;
    let masked = timer & 1 << 16 != 0;
    if !deadline_mode || masked {
        return;
    }
    let tsc = msrs
        .iter()
        .find(|(index, _)| *index == MSR_TSC)
        .map(|(_, value)| *value);
    if let Some((_, deadline)) = msrs
        .iter_mut()
        .find(|(index, _)| *index == MSR_TSC_DEADLINE)
        && *deadline == 0
        && let Some(tsc) = tsc
    {
        *deadline = tsc;
    }
}

fn xsave_words(xsave: &Xsave) -> Vec<u32> {
    let fixed = &xsave.as_fam_struct_ref().xsave.region;
    fixed.iter().chain(xsave.as_slice()).copied().collect()
}

fn xsave_from_words(words: &[u32], format: &StateFormat) -> Result<Xsave, VcpuError> {
    let mut xsave = format.xsave()?;
    let (fixed_len, extra_len) = (
        xsave.as_fam_struct_ref().xsave.region.len(),
        xsave.as_slice().len(),
    );
    // An image that is larger than this host's has features that this host lacks.
    if words.len() < fixed_len || words.len() - fixed_len > extra_len {
        return Err(VcpuError::Corrupt("extended state of another CPU"));
    }
    let (fixed, extra) = words.split_at(fixed_len);
    xsave.as_mut_slice()[..extra.len()].copy_from_slice(extra);
    // SAFETY: the wrapper asks that its length field is left alone, and only the region of plain
    // words is written.
    unsafe { xsave.as_mut_fam_struct() }
        .xsave
        .region
        .copy_from_slice(fixed);
    Ok(xsave)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    fn lapic_with_timer(timer: u32) -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        for (slot, byte) in lapic.regs[0x320..].iter_mut().zip(timer.to_le_bytes()) {
            *slot = byte as i8;
        }
        lapic
    }

    fn deadline_after_repair(timer: u32, deadline: u64) -> u64 {
        let mut msrs = vec![(MSR_TSC, 1000), (MSR_TSC_DEADLINE, deadline)];
        repair_deadline(&mut msrs, &lapic_with_timer(timer));
        msrs[1].1
    }

    #[test]
    fn a_deadline_that_passed_during_the_save_fires_at_once() {
        assert_eq!(deadline_after_repair(2 << 17 | 0xEC, 0), 1000);
    }

    #[test]
    fn a_deadline_ahead_or_a_timer_not_in_use_stays() {
        assert_eq!(deadline_after_repair(2 << 17 | 0xEC, 5000), 5000);
        assert_eq!(deadline_after_repair(2 << 17 | 1 << 16, 0), 0);
        assert_eq!(deadline_after_repair(0xEC, 0), 0);
    }

    #[test]
    fn a_reset_leaves_what_the_cpu_is_and_its_counter() {
        let mut state = VcpuState::blank();
        state.cpuid = vec![kvm_cpuid_entry2::default()];
        state.msrs = vec![(MSR_TSC, 9), (0x10A, 8), (MSR_TSC_DEADLINE, 0), (0x277, 7)];
        let power_on = state.into_power_on();
        assert!(power_on.cpuid.is_empty());
        assert_eq!(power_on.msrs, [(MSR_TSC_DEADLINE, 0), (0x277, 7)]);
    }

    #[test]
    fn an_extended_state_of_another_size_is_refused() {
        let format = StateFormat {
            msr_indices: Vec::new(),
            xsave_bytes: 4096,
        };
        assert!(xsave_from_words(&[0; 1024], &format).is_ok());
        assert!(xsave_from_words(&[0; 1023], &format).is_err());
        assert!(xsave_from_words(&[0; 1025], &format).is_err());
    }
}
