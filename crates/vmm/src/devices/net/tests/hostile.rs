//! Drivers and hosts that do what they must not.

use super::*;

#[test]
fn a_frame_longer_than_any_link_is_dropped() {
    let mut rig = Rig::active(MERGE, 1);
    rig.queues[TX].add(&[(0, MAX_FRAME as u32 + 1, 0)]);
    rig.kick(TX).unwrap();
    assert_eq!(rig.queues[TX].take_used(), [(0, 0)]);
    assert_eq!(rig.counts().tx_dropped, 1);
}

/// Every way to break a data queue: what the driver does, and to which queue.
#[test]
fn a_hostile_driver_breaks_its_device_and_nothing_else() {
    type Attack = fn(&mut DriverQueue, u16);
    let attacks: [(&str, Attack); 7] = [
        ("a loop", |queue, flags| {
            queue.write_descriptor(0, 0x1000, 64, flags | NEXT, 1);
            queue.write_descriptor(1, 0x1000, 64, flags | NEXT, 0);
            queue.offer(0);
        }),
        ("a next outside the table", |queue, flags| {
            queue.write_descriptor(0, 0x1000, 64, flags | NEXT, 999);
            queue.offer(0);
        }),
        ("a head outside the table", |queue, _| queue.offer(256)),
        ("a buffer outside RAM", |queue, flags| {
            queue.add(&[(RAM as u64 - 10, 64, flags)]);
        }),
        ("a huge buffer", |queue, flags| {
            queue.add(&[(0x1000, u32::MAX, flags)]);
        }),
        ("the wrong direction", |queue, flags| {
            queue.add(&[(0x1000, 64, flags ^ WRITE)]);
        }),
        ("less than a header", |queue, flags| {
            queue.add(&[(0x1000, 11, flags)]);
        }),
    ];
    for (what, attack) in attacks {
        for (index, flags) in [(RX, WRITE), (TX, 0)] {
            let mut rig = Rig::active(MERGE, 1);
            attack(&mut rig.queues[index], flags);
            let error = rig.kick(index).expect_err(what);
            assert!(
                matches!(error, DeviceError::Driver { .. }),
                "{what}: {error}"
            );
            // It no longer waits for anything, and a reset brings it back.
            rig.arrive(0, &pattern(60));
            rig.device(VirtioDevice::reset);
            rig.activate().unwrap();
        }
    }
}

#[test]
fn a_jump_of_the_available_index_breaks_the_device() {
    let rig = Rig::active(MERGE, 1);
    rig.queues[TX].set_avail_index(300);
    let error = rig.kick(TX).unwrap_err();
    assert!(
        matches!(error, DeviceError::Queue { queue: 1, .. }),
        "{error}"
    );
}

#[test]
fn a_tap_that_goes_away_breaks_the_device_without_spinning() {
    let mut rig = Rig::active(MERGE, 1);
    rig.wires.clear();
    rig.settle();
    let failure = rig.handler.lock().unwrap().failure.take();
    assert!(
        matches!(failure, Some(DeviceError::Host { .. })),
        "{failure:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the rings hold, the device answers or breaks: it does not panic, hang or spin.
    #[test]
    fn random_rings_never_harm_the_device(
        rings in proptest::collection::vec(any::<u8>(), 0x6000),
        avail_index in 0_u16..300,
        buffers in 1_u64..64,
    ) {
        let mut rig = Rig::active(MULTI, 1);
        for index in 0..3 {
            rig.write(RINGS + index * 0x8000, &rings);
            // Some descriptors that make sense, so that more than the first check is reached.
            for number in 0..buffers as u16 {
                let flags = u16::from(rings[usize::from(number)]) & (WRITE | NEXT);
                let len = u32::from(rings[usize::from(number) + 100]) * 8;
                rig.queues[index as usize].write_descriptor(
                    number, u64::from(len) * 512, len, flags, number + 1,
                );
            }
            rig.queues[index as usize].set_avail_index(avail_index);
            let _ = rig.kick(index as usize);
            rig.device(VirtioDevice::reset);
            rig.activate().unwrap();
            rig.queues[index as usize].set_avail_index(avail_index);
            let _ = rig.wires[0].write(&[0; 100]);
            rig.settle();
        }
    }
}
