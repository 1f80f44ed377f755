//! Pause, save, restore, and what a device is built from.

use super::*;

#[test]
fn udp_segmentation_is_offered_where_the_tap_knows_it() {
    let offered = |refused: Option<u32>| {
        let (port, _wire, settings) = SocketPort::pair().unwrap();
        if let Some(flags) = refused {
            settings.refuse_offloads(flags);
        }
        let resources = NetResources {
            ports: vec![Box::new(port)],
            vhost: Vec::new(),
        };
        let device = Net::new(resources, config(1)).unwrap();
        device.features() >> VIRTIO_NET_F_HOST_USO & 1
    };
    assert_eq!(offered(None), 1);
    assert_eq!(offered(Some(TUN_F_USO4)), 0);
}

#[test]
fn a_paused_device_touches_nothing_and_a_resumed_one_catches_up() {
    let mut rig = Rig::active(MERGE, 1);
    rig.pause();
    let head = rig.queues[RX].add(&[(0x1000, 2000, WRITE)]);
    rig.arrive(0, &pattern(60));
    rig.kick(RX).unwrap();
    assert!(rig.queues[RX].take_used().is_empty());
    rig.resume();
    rig.settle();
    assert_eq!(rig.queues[RX].take_used(), [(head, 72)]);
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_stopped() {
    let features = MULTI | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    let mut rig = Rig::active(features, 2);
    assert_eq!(rig.command(&[4, 0, 2, 0]), 0);
    for number in 0..3 {
        rig.queues[RX].add(&[(0x1000 + number * 0x1000, 1000, WRITE)]);
    }
    rig.arrive(0, &pattern(60));
    rig.pause();
    // Sent by the guest just before the pause, and not seen by the device.
    rig.queues[TX].add(&[(0x1000, 100, 0)]);
    let (saved, positions) = rig.device(|device| {
        let positions: Vec<_> = device
            .queues()
            .into_iter()
            .map(|(index, queue)| (index, crate::virtio::SavedQueue::from(queue)))
            .collect();
        (device.save().unwrap(), positions)
    });
    assert_eq!(positions.len(), 5);

    let new_mac = [2, 0, 0, 0, 0, 9];
    let mut restored = Rig::with_config(
        features,
        2,
        NetConfig {
            mac: new_mac,
            ..config(2)
        },
    );
    restored.device(|device| device.restore(&saved).unwrap());
    let refused = Rig::new(features, 1).device(|device| device.restore(&saved));
    assert!(refused.is_err(), "it has one pair of queues only");
    restored.ram = rig.ram.clone();
    restored.queues = std::mem::take(&mut rig.queues);
    assert_eq!(
        restored.device(|device| device.features()),
        rig.device(|device| device.features())
    );
    let queues = positions
        .into_iter()
        .map(|(index, position)| ActiveQueue {
            index,
            queue: Queue::try_from(position).unwrap(),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        })
        .collect();
    restored.activate_with(queues).unwrap();
    assert!(restored.settings[1].attached());
    assert_eq!(restored.interrupt.config_count(), 1);
    let mut config = [0; 8];
    restored.device(|device| device.read_config(0, &mut config));
    assert_eq!(config[..6], new_mac);
    assert_eq!(
        config[6], 3,
        "the link is up and the guest is to announce itself"
    );
    // The kicks that activation made.
    restored.kick(TX).unwrap();
    restored.arrive(0, &pattern(60));
    assert_eq!(restored.queues[TX].take_used(), [(0, 0)]);
    assert_eq!(restored.queues[RX].take_used(), [(0, 72), (1, 72)]);
    assert_eq!(restored.command(&[3, 0]), 0);
    restored.device(|device| device.read_config(0, &mut config));
    assert_eq!(config[6], 1);
}

#[test]
fn resources_that_do_not_fit_the_state_are_refused() {
    let (port, _wire, _settings) = SocketPort::pair().unwrap();
    let resources = NetResources {
        ports: vec![Box::new(port)],
        vhost: Vec::new(),
    };
    let refusal = Net::new(resources, config(2)).err();
    assert!(
        matches!(refusal, Some(DeviceError::State { .. })),
        "{refusal:?}"
    );
}
