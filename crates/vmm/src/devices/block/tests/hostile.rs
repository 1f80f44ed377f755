//! Requests that do not fit, and drivers that break the rules.

use proptest::prelude::*;

use super::*;

#[test]
fn requests_that_do_not_fit_the_disk_fail_alone() {
    let mut rig = Rig::plain(Writes::Base);
    for (kind, sector, len) in [
        (VIRTIO_BLK_T_IN, 2048, 512),
        (VIRTIO_BLK_T_IN, 2047, 1024),
        (VIRTIO_BLK_T_OUT, u64::MAX, 512),
        (VIRTIO_BLK_T_OUT, u64::MAX / 512, 512),
        (VIRTIO_BLK_T_IN, 0, 100),
    ] {
        assert_eq!(
            rig.request(kind, sector, len),
            VIRTIO_BLK_S_IOERR,
            "{kind} {sector} {len}"
        );
    }
    assert_eq!(rig.request(77, 0, 512), VIRTIO_BLK_S_UNSUPP);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 2047, 512), VIRTIO_BLK_S_OK);
}

#[test]
fn ranges_with_unknown_flags_or_lengths_are_refused() {
    let mut rig = Rig::plain(Writes::Base);
    rig.range(0, 8, 1);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_DISCARD, 0, 16),
        VIRTIO_BLK_S_UNSUPP
    );
    rig.range(0, 8, 2);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 16),
        VIRTIO_BLK_S_UNSUPP
    );
    rig.range(0, u32::MAX, 0);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 16),
        VIRTIO_BLK_S_IOERR
    );
    rig.range(u64::MAX / 2, 8, 0);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 16),
        VIRTIO_BLK_S_IOERR
    );
    assert_eq!(
        rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 24),
        VIRTIO_BLK_S_IOERR
    );
}

#[test]
fn a_driver_that_breaks_the_rules_breaks_its_device_only() {
    let far = RAM_BYTES as u64;
    let broken: [&[(u64, u32, u16)]; 8] = [
        &[(HEADERS, 16, 0)],
        &[(STATUS, 1, WRITE)],
        &[(HEADERS, 15, 0), (STATUS, 1, WRITE)],
        &[(far, 16, 0), (STATUS, 1, WRITE)],
        &[(HEADERS, 16, 0), (far, 1, WRITE)],
        &[
            (HEADERS, 16, 0),
            (far - 512, 1024, WRITE),
            (STATUS, 1, WRITE),
        ],
        &[
            (HEADERS, 16, 0),
            (u64::MAX - 1, u32::MAX, WRITE),
            (STATUS, 1, WRITE),
        ],
        &[(0x8_0000, 24, INDIRECT)],
    ];
    for chain in broken {
        let mut rig = Rig::plain(Writes::Base);
        rig.driver.add(chain);
        assert!(rig.kick().is_err(), "{chain:?}");
        rig.device.lock().unwrap().reset();
        assert!(rig.device.lock().unwrap().queues().is_empty());
    }
}

#[test]
fn a_chain_that_loops_or_an_index_that_jumps_breaks_the_device() {
    let mut rig = Rig::plain(Writes::Base);
    rig.driver.write_descriptor(0, HEADERS, 16, 1, 1);
    rig.driver.write_descriptor(1, DATA, 512, 1 | WRITE, 0);
    rig.driver.offer(0);
    assert!(matches!(rig.kick(), Err(DeviceError::Driver { .. })));
    let rig = Rig::plain(Writes::Base);
    rig.driver.set_avail_index(QUEUE_SIZE + 1);
    assert!(matches!(rig.kick(), Err(DeviceError::Queue { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn no_ring_content_harms_the_host(
        descriptors in prop::collection::vec(
            (prop_oneof![0u64..0x90_0000, any::<u64>()], prop_oneof![0u32..5000, any::<u32>()], 0u16..8, 0u16..10),
            8
        ),
        header in (0u32..16, 0u64..3000),
        heads in prop::collection::vec(0u16..9, 1..6),
        index in prop::option::of(any::<u16>()),
    ) {
        let mut rig = Rig::new(
            EngineKind::Blocking, Writes::Ephemeral(None), &BlockConfig::default(), FLUSH,
        );
        for at in [HEADERS, DATA] {
            rig.ram.write_obj([header.0, 0], GuestAddress(at)).unwrap();
            rig.ram.write_obj(header.1, GuestAddress(at + 8)).unwrap();
        }
        for (number, (address, len, flags, next)) in descriptors.into_iter().enumerate() {
            // Some descriptors are as a driver would make them.
            let address = if address % 3 == 0 { HEADERS } else { address };
            let len = if len % 3 == 0 { 16 } else { len };
            rig.driver.write_descriptor(number as u16, address, len, flags, next);
        }
        for head in heads {
            rig.driver.offer(head);
        }
        if let Some(index) = index {
            rig.driver.set_avail_index(index);
        }
        // Either is fine: what matters is that it returns, and that a reset brings rest.
        let _ = rig.kick();
        rig.device.lock().unwrap().reset();
        prop_assert!(rig.device.lock().unwrap().disk().lock().unwrap().is_idle());
    }
}
