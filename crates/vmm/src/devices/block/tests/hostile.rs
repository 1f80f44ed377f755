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

#[test]
fn segments_beyond_what_was_announced_fail_their_request_alone() {
    const SIZE_MAX: u32 = super::super::state::SIZE_MAX;
    const SEG_MAX: usize = super::super::state::SEG_MAX as usize;
    let mut rig = Rig::plain(Writes::Base);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, SIZE_MAX), VIRTIO_BLK_S_OK);
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        assert_eq!(rig.request(kind, 0, SIZE_MAX + 512), VIRTIO_BLK_S_IOERR);
    }
    for (segments, expected) in [
        (SEG_MAX, VIRTIO_BLK_S_OK),
        // The last segment is short: header, data and status are a queue's worth.
        (SEG_MAX + 1, VIRTIO_BLK_S_IOERR),
    ] {
        let mut rig = Rig::plain(Writes::Base);
        let (header, status) = rig.header(VIRTIO_BLK_T_IN, 0);
        let mut table = vec![(header, 16, 0)];
        table.extend(vec![(DATA, 512, WRITE); segments]);
        table.push((status, 1, WRITE));
        // The status shares the last segment where a chain has no room for one more.
        if table.len() > usize::from(QUEUE_SIZE) {
            table.pop();
            table[SEG_MAX + 1].1 = 513;
        }
        rig.indirect(&table);
        rig.finish(1);
        let status = match expected {
            VIRTIO_BLK_S_OK => rig.status(status),
            _ => rig.status(DATA + 512),
        };
        assert_eq!(status, expected, "{segments} segments");
    }
}

/// The requests that one call answers, of so many that read a mebibyte each.
fn answered_in_one_call(rig: &mut Rig, requests: usize) -> usize {
    for _ in 0..requests {
        rig.add(VIRTIO_BLK_T_IN, 0, DATA, 1 << 20);
    }
    // The first look at the queue was asked for by the activation.
    let _ = rig._kick.read();
    rig.kick().unwrap();
    rig.driver.take_used().len()
}

#[test]
fn a_flood_of_large_requests_gives_others_their_turn() {
    let mut rig = Rig::new(
        EngineKind::Blocking,
        Writes::Base,
        &BlockConfig::default(),
        FLUSH,
    );
    assert_eq!(answered_in_one_call(&mut rig, 80), 16);
    let mut answered = 16;
    while rig._kick.read().is_ok() {
        rig.kick().unwrap();
        let count = rig.driver.take_used().len();
        assert!(count <= 16, "{count} in one call");
        answered += count;
    }
    assert_eq!(answered, 80, "a queue was forgotten");
}

#[test]
fn a_flood_of_small_requests_gives_others_their_turn() {
    let config = BlockConfig::default();
    let mut rig = Rig::new(EngineKind::Blocking, Writes::Base, &config, FLUSH);
    let mut budget = BUDGET;
    for _ in 0..4 * QUEUE_SIZE {
        assert!(!budget.is_spent());
        budget.spend(512);
    }
    assert!(budget.is_spent());
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_OK);
}

#[test]
fn a_disk_is_given_no_more_than_a_pause_can_wait_for() {
    for engine in [EngineKind::Uring, EngineKind::Worker] {
        let mut rig = Rig::new(engine, Writes::Base, &BlockConfig::default(), FLUSH);
        let mut answered = answered_in_one_call(&mut rig, 80);
        let deadline = Instant::now() + Duration::from_secs(30);
        while answered < 80 {
            assert!(Instant::now() < deadline, "an answer is missing");
            if rig._kick.read().is_ok() {
                rig.kick().unwrap();
            }
            assert!(rig.device.lock().unwrap().in_flight.bytes() <= MAX_IN_FLIGHT);
            rig.events.run_once(10).unwrap();
            answered += rig.driver.take_used().len();
        }
        assert_eq!(rig.device.lock().unwrap().in_flight.bytes(), 0);
    }
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
