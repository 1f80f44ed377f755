//! Saved CPUs on a real KVM: what a boot gives is restored, and what exceeds it is refused.
//!
//! No guest runs in it, so any `/dev/kvm` will do.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use clone_memory::{GuestMemory, RamLayout};
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::{Machine, MachineError, MachineState, Parts, RestoreError};
use clone_vmm::snapshot::{CpuProfile, decode, encode};
use clone_vmm::vcpu::{Refusal, VcpuError, VcpuState};
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

const VCPUS: u8 = 3;

fn parts() -> Parts {
    Parts {
        kvm: Kvm::new().unwrap(),
        memory: GuestMemory::anonymous(&RamLayout::new(64 << 20).unwrap()).unwrap(),
        vcpus: VCPUS,
        console: Box::new(std::io::sink()),
        devices: Vec::new(),
        confine_vcpu: Arc::new(|| Ok(())),
    }
}

/// The state of a machine that was just made.
fn saved() -> MachineState {
    let mut events = EventLoop::new().unwrap();
    Machine::new(parts(), &mut events)
        .unwrap()
        .pause()
        .unwrap()
        .save()
        .unwrap()
}

fn restore(state: MachineState) -> Result<MachineState, MachineError> {
    let mut events = EventLoop::new().unwrap();
    Machine::restore(parts(), &state, &mut events)
        .map(|mut machine| machine.pause().unwrap().save().unwrap())
}

/// The refusal of a machine whose CPU `id` was changed.
fn refusal_of(id: u8, change: impl FnOnce(&mut VcpuState)) -> Refusal {
    let mut state = saved();
    change(&mut state.vcpus[usize::from(id)]);
    match restore(state).map(drop) {
        Err(MachineError::Vcpu(VcpuError::Refused { vcpu, refusal })) => {
            assert_eq!(vcpu, id);
            refusal
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_machine_is_restored_twice_over_as_it_was_saved() {
    let state = decode(&encode(&saved()).unwrap()).unwrap();
    let again = restore(state.clone()).unwrap();
    for (before, after) in state.vcpus.iter().zip(&again.vcpus) {
        assert_eq!(before.cpuid_entries(), after.cpuid_entries());
    }
    restore(again).unwrap();
}

/// What of a CPU does not change by itself while it is paused.
fn at_rest(state: &MachineState) -> Vec<VcpuState> {
    let mut vcpus = state.vcpus.clone();
    for vcpu in &mut vcpus {
        // Counters of time.
        vcpu.msr_values_mut().retain(|(index, _)| *index != 0x10);
    }
    vcpus
}

#[test]
fn a_machine_that_has_run_is_put_back_in_place_any_number_of_times() {
    const COUNTER: GuestAddress = GuestAddress(0x500);
    let mut start = saved();
    // The first CPU starts in real mode at 0:fff0: `again: inc word [0x500]; jmp again`.
    let registers = start.vcpus[0].system_registers_mut();
    (registers.cs.base, registers.cs.selector) = (0, 0);
    let parts = parts();
    let ram = parts.memory.ram().clone();
    let code = [0xFF, 0x06, 0x00, 0x05, 0xEB, 0xFA];
    ram.write_slice(&code, GuestAddress(0xFFF0)).unwrap();
    let mut events = EventLoop::new().unwrap();
    let mut machine = Machine::restore(parts, &start, &mut events).unwrap();
    let before = at_rest(&machine.pause().unwrap().save().unwrap());
    for _ in 0..3 {
        ram.write_obj(0_u16, COUNTER).unwrap();
        machine.resume().unwrap();
        while ram.read_obj::<u16>(COUNTER).unwrap() == 0 {
            assert_eq!(machine.exit(), None);
            std::thread::yield_now();
        }
        let mut paused = machine.pause().unwrap();
        let mut other = start.clone();
        other.vcpus[1].cpuid_entries_mut().pop();
        let refused = paused.restore(&other).unwrap_err();
        assert!(matches!(refused, RestoreError::Refused(_)), "{refused}");
        paused.restore(&start).unwrap();
        assert_eq!(at_rest(&paused.save().unwrap()), before);
    }
}

#[test]
fn a_boot_here_gives_what_a_host_of_this_profile_can_run() {
    let host = CpuProfile::of_host(&Kvm::new().unwrap()).unwrap();
    let saved = CpuProfile::of_saved(&saved().vcpus);
    assert_eq!(host.can_run(&saved), Ok(()));
    assert!(host.features["80000001.ecx"] & 1 << 2 == 0, "svm is hidden");
    for word in ["d.eax", "40000001.eax"] {
        assert!(saved.features.contains_key(word), "{word}");
    }
    // Not every CPU has these leaves; what the host has, its guests' profile lists.
    for word in ["7.1.eax", "80000008.ebx"] {
        let listed = saved.features.contains_key(word);
        assert_eq!(listed, host.features.contains_key(word), "{word}");
    }
}

#[test]
fn nested_virtualisation_is_refused_on_every_cpu() {
    for id in 0..VCPUS {
        let svm = refusal_of(id, |cpu| {
            let entries = cpu.cpuid_entries_mut().iter_mut();
            let mut leaf = entries.filter(|entry| entry.function == 0x8000_0001);
            leaf.next().unwrap().ecx |= 1 << 2;
        });
        assert_eq!(
            svm,
            Refusal::Exceeds(vec!["svm (80000001.ecx bit 2)".into()])
        );
    }
    let efer = refusal_of(1, |cpu| cpu.system_registers_mut().efer |= 1 << 12);
    assert_eq!(efer, Refusal::Exceeds(vec!["svm (EFER bit 12)".into()]));
    let cr4 = refusal_of(2, |cpu| cpu.system_registers_mut().cr4 |= 1 << 13);
    assert_eq!(cr4, Refusal::Exceeds(vec!["vmx (CR4 bit 13)".into()]));
}

#[test]
fn msrs_that_a_boot_does_not_set_are_refused() {
    for (index, value, name) in [
        (0xC001_0117, 0x1000, "svm"),
        (0x480, 1, "VMX"),
        (0x4000_0001, 0x1001, "Hyper-V"),
        (0x4B56_4D04, 0x1001, "kvm_pv_eoi"),
        (0x3A, 5, "vmx (IA32_FEATURE_CONTROL bit 2)"),
        (0x1234_5678, 1, "the MSR 0x12345678"),
    ] {
        let refusal = refusal_of(1, |cpu| {
            cpu.msr_values_mut().retain(|(known, _)| *known != index);
            cpu.msr_values_mut().push((index, value));
        });
        assert!(refusal.to_string().contains(name), "{refusal}");
    }
}

#[test]
fn cpus_that_changed_places_are_refused() {
    let mut state = saved();
    state.vcpus.swap(0, 1);
    let error = restore(state).map(drop).unwrap_err().to_string();
    assert!(error.contains("CPU 0"), "{error}");
}

#[test]
fn a_clock_that_no_machine_reaches_is_refused() {
    let mut state = saved();
    state.clock.nanoseconds = u64::MAX;
    let error = restore(state).map(drop).unwrap_err();
    assert!(matches!(error, MachineError::State(_)), "{error}");
}
