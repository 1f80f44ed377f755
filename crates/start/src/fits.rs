//! Checks that a saved machine has the described shape.

use clone_api::Shape;
use clone_vmm::machine::MachineState;
use clone_vmm::pci::virtio_pci::VirtioPciState;

// Virtio device ids (VIRTIO 5).
const VIRTIO_ID_NET: u32 = 1;
const VIRTIO_ID_BLOCK: u32 = 2;
const VIRTIO_ID_RNG: u32 = 4;
const VIRTIO_ID_BALLOON: u32 = 5;
const VIRTIO_ID_VSOCK: u32 = 19;
const VIRTIO_ID_FS: u32 = 26;

/// The virtio device ids of a machine of this shape, in slot order: disks, interfaces, vsock,
/// balloon, rng, shares.
pub fn kinds(shape: &Shape) -> Vec<u32> {
    let mut kinds = vec![VIRTIO_ID_BLOCK; shape.disks.len()];
    kinds.extend(shape.nets.iter().map(|_| VIRTIO_ID_NET));
    kinds.extend(shape.vsock.map(|_| VIRTIO_ID_VSOCK));
    kinds.extend(shape.balloon.map(|_| VIRTIO_ID_BALLOON));
    kinds.extend(shape.rng.then_some(VIRTIO_ID_RNG));
    kinds.extend(shape.shares.iter().map(|_| VIRTIO_ID_FS));
    kinds
}

/// Checks that `state` has the parts of a machine of this shape; the error says what differs. Each
/// device checks its own state when it is built.
pub fn check_fits(state: &MachineState, shape: &Shape) -> std::result::Result<(), String> {
    let (saved, described) = (state.vcpus.len(), shape.vcpus as usize);
    if saved != described {
        return Err(format!("it has {saved} CPUs for a machine of {described}"));
    }
    let saved: Vec<u32> = state
        .devices
        .iter()
        .map(VirtioPciState::device_type)
        .collect();
    match saved == kinds(shape) {
        true => Ok(()),
        false => Err("its devices are not those of its machine".to_owned()),
    }
}
