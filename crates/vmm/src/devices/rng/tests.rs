//! The device under a driver made of plain memory.

use super::{Rng, *};
use crate::virtio::driver::Rig;
use crate::virtio::testing::ram;
use proptest::prelude::*;
use std::num::NonZeroU32;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

fn rig(limit: Option<RateLimit>) -> Rig<Rng> {
    let device = Rng::new(limit).unwrap();
    Rig::new(device, ram(1 << 20), 64, 1 << VIRTIO_RING_F_EVENT_IDX)
}

fn draw(rig: &mut Rig<Rng>, at: u64, len: u32) -> Vec<u8> {
    rig.queues[0].offer(&[(at, len, true)]);
    rig.kick(0);
    assert_eq!(rig.error(), None);
    let (_, used) = rig.queues[0].take_used().unwrap();
    let mut bytes = vec![0; used as usize];
    rig.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn requests_are_filled_with_bytes_that_differ() {
    let mut rig = rig(None);
    let at = rig.buffers();
    let first = draw(&mut rig, at, 64);
    assert_eq!(first.len(), 64);
    assert_ne!(first, [0; 64]);
    assert_ne!(first, draw(&mut rig, at, 64));
    // Not a byte beyond the request.
    let after: u64 = rig.ram.read_obj(GuestAddress(at + 64)).unwrap();
    assert_eq!(after, 0);
}

#[test]
fn a_huge_request_is_cut_not_refused() {
    let mut rig = rig(None);
    let at = rig.buffers();
    assert_eq!(draw(&mut rig, at, 512 << 10).len(), MAX_REQUEST);
}

#[test]
fn a_request_spread_over_buffers_is_filled_in_order() {
    let mut rig = rig(None);
    let at = rig.buffers();
    rig.queues[0].offer(&[(at, 16, true), (at + 100, 16, true)]);
    rig.kick(0);
    assert_eq!(rig.queues[0].take_used().unwrap().1, 32);
    for part in [at, at + 100] {
        assert_ne!(rig.ram.read_obj::<u128>(GuestAddress(part)).unwrap(), 0);
    }
    assert_eq!(rig.ram.read_obj::<u64>(GuestAddress(at + 16)).unwrap(), 0);
}

#[test]
fn a_limited_guest_waits_and_then_gets_its_bytes() {
    let limit = RateLimit {
        bytes: NonZeroU32::new(100).unwrap(),
        interval: Duration::from_millis(40),
    };
    let mut rig = rig(Some(limit));
    let at = rig.buffers();
    assert_eq!(draw(&mut rig, at, 1000).len(), 100);
    rig.queues[0].offer(&[(at, 50, true)]);
    rig.kick(0);
    let mut used = rig.queues[0].take_used();
    assert!(used.is_none());
    while used.is_none() {
        rig.wait();
        used = rig.queues[0].take_used();
    }
    assert!(used.unwrap().1 > 0);
}

#[test]
fn a_request_that_waited_at_the_save_is_served_after_the_restore() {
    let mut old = rig(None);
    let at = old.buffers();
    draw(&mut old, at, 8);
    old.queues[0].offer(&[(at, 8, true)]);
    let (bytes, queues) = old.save();
    old.kick(0);
    assert!(old.queues[0].take_used().is_none(), "served while paused");
    let mut device = Rng::new(None).unwrap();
    device.restore(&bytes).unwrap();
    let mut new = Rig::restored(device, &old, &queues);
    assert_eq!(new.queues[0].take_used().unwrap().1, 8);
    // The paused one goes on as well: both are alive.
    old.resume();
    assert!(old.queues[0].take_used().is_some());
}

#[test]
fn the_device_starts_afresh_after_a_reset() {
    let mut rig = rig(Some(RateLimit {
        bytes: NonZeroU32::MAX,
        interval: Duration::from_secs(1),
    }));
    rig.device(|shell| shell.device.reset());
    rig.activate_again();
    let at = rig.buffers();
    assert_eq!(draw(&mut rig, at, 8).len(), 8);
}

#[test]
fn a_device_that_is_reset_in_a_pause_starts_afresh() {
    let mut rig = rig(Some(RateLimit {
        bytes: NonZeroU32::MAX,
        interval: Duration::from_secs(1),
    }));
    rig.pause();
    rig.device(|shell| shell.device.reset());
    rig.activate_again();
    let at = rig.buffers();
    assert_eq!(draw(&mut rig, at, 8).len(), 8);
}

#[test]
fn requests_without_room_or_outside_ram_break_the_device() {
    for bad in [
        &[(0x8_0000, 8, false)][..],
        &[(0x8_0000, 0, true)],
        &[(0x8_0000, 8, false), (0x8_0000, 8, true)],
        &[(0xf_fff8, 16, true)],
        &[(u64::MAX, 2, true)],
    ] {
        let mut rig = rig(None);
        rig.queues[0].offer(bad);
        rig.kick(0);
        assert!(rig.error().is_some(), "{bad:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_descriptor_chain_panics_the_device(
        descriptors in prop::collection::vec((0_u64..0x18_0000, prop_oneof![0_u32..5000, any::<u32>()], 0_u16..8, 0_u16..70), 1..64),
        heads in prop::collection::vec(0_u16..70, 1..64),
    ) {
        let mut rig = rig(None);
        for (&(address, len, flags, next), index) in descriptors.iter().zip(0..) {
            rig.queues[0].descriptor(index, address, len, flags, next);
        }
        for head in heads {
            rig.queues[0].make_available(head);
        }
        rig.kick(0);
    }
}
