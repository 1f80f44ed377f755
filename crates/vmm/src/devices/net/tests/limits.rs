//! Rate limits.

use super::*;

/// A device that lets three frames pass at once, and then one in 10 ms.
fn limited() -> Rig {
    let operations = Some(Rate {
        per_second: 100,
        burst: 3,
    });
    let limited = NetConfig {
        limits: RateLimits {
            bytes: None,
            operations,
        },
        ..config(1)
    };
    let mut rig = Rig::with_config(MERGE, 1, limited);
    rig.activate().unwrap();
    rig
}

#[test]
fn frames_over_the_limit_wait_for_its_timer_each_way_by_itself() {
    let mut rig = limited();
    let start = Instant::now();
    for number in 0..8 {
        rig.queues[RX].add(&[(0x1000 + number * 0x1000, 1500, WRITE)]);
        rig.queues[TX].add(&[(0x9000, 100, 0)]);
        rig.wires[0].write_all(&[0; 100]).unwrap();
    }
    rig.kick(TX).unwrap();
    rig.kick(RX).unwrap();
    let first = (rig.counts().rx_frames, rig.counts().tx_frames);
    assert!(first.0 >= 3 && first.1 >= 3, "{first:?}");
    while rig.counts().rx_frames < 8 || rig.counts().tx_frames < 8 {
        // Only the timers wake it: without them it would wait for ever.
        assert!(rig.events.run_once(5000).unwrap() > 0);
    }
    assert!(start.elapsed() >= Duration::from_millis(40));
    assert_eq!(rig.queues[TX].take_used().len(), 8);
    assert_eq!(rig.counts().rx_dropped, 0);
}

#[test]
fn nothing_of_a_paused_device_wakes_the_event_loop() {
    let mut rig = limited();
    for _ in 0..8 {
        rig.queues[TX].add(&[(0x9000, 100, 0)]);
    }
    rig.kick(TX).unwrap();
    rig.pause();
    rig.device(|device| device.handle())
        .set_link(false)
        .unwrap();
    assert_eq!(
        rig.events.run_once(50).unwrap(),
        0,
        "the limit's timer or the link"
    );
    rig.resume();
    rig.settle();
    assert_eq!(rig.interrupt.config_count(), 1);
}

#[test]
fn a_limited_device_takes_no_vhost() {
    let (port, _wire, _settings) = SocketPort::pair().unwrap();
    let limited = NetConfig {
        limits: RateLimits {
            bytes: Some(Rate::per_second(1000)),
            operations: None,
        },
        ..config(1)
    };
    assert!(!NetState::fresh(limited).allows_vhost());
    let resources = NetResources {
        ports: vec![Box::new(port)],
        vhost: vec![File::open("/dev/null").unwrap()],
    };
    let refusal = Net::new(resources, limited).err();
    assert!(
        matches!(refusal, Some(DeviceError::State { .. })),
        "{refusal:?}"
    );
}
