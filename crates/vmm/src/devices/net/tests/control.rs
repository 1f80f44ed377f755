//! The control queue, the configuration space and the link.

use super::*;

#[test]
fn the_configuration_space_tells_address_link_pairs_and_mtu() {
    let rig = Rig::new(MERGE, 3);
    let mut bytes = [0xff; 16];
    rig.device(|device| device.read_config(0, &mut bytes));
    assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0x78, 5, 0, 0, 0, 0]);
    let mut past = [0xff; 4];
    rig.device(|device| device.read_config(u64::MAX - 1, &mut past));
    assert_eq!(past, [0; 4]);
}

#[test]
fn unplugging_stops_traffic_and_tells_the_guest() {
    let mut rig = Rig::active(MERGE, 1);
    rig.queues[RX].add(&[(0x1000, 2000, WRITE)]);
    let handle = rig.device(|device| device.handle());
    handle.set_link(false).unwrap();
    rig.settle();
    assert_eq!(rig.interrupt.config_count(), 1);
    let mut status = [0xff; 2];
    rig.device(|device| device.read_config(6, &mut status));
    assert_eq!(status, [0, 0]);
    rig.arrive(0, &pattern(60));
    rig.kick(RX).unwrap();
    assert!(rig.queues[RX].take_used().is_empty());
    handle.set_link(true).unwrap();
    rig.settle();
    assert_eq!(rig.interrupt.config_count(), 2);
    assert_eq!(rig.queues[RX].take_used().len(), 1);
}

#[test]
fn queue_pairs_join_and_leave_as_the_driver_says() {
    let mut rig = Rig::active(MULTI, 3);
    let attached = |rig: &Rig| -> Vec<bool> {
        rig.settings
            .iter()
            .map(|settings| settings.attached())
            .collect()
    };
    assert_eq!(attached(&rig), [true, false, false]);
    assert_eq!(rig.command(&[4, 0, 3, 0]), 0);
    assert_eq!(attached(&rig), [true, true, true]);
    let head = rig.queues[4].add(&[(0x1000, 2000, WRITE)]);
    rig.arrive(2, &pattern(60));
    rig.kick(4).unwrap();
    assert_eq!(rig.queues[4].take_used(), [(head, 72)]);
    assert_eq!(rig.command(&[4, 0, 2, 0]), 0);
    assert_eq!(attached(&rig), [true, true, false]);
    for wrong in [0, 4, 255] {
        assert_eq!(rig.command(&[4, 0, wrong, 0]), 1);
    }
    assert_eq!(attached(&rig), [true, true, false]);
}

#[test]
fn the_control_queue_follows_the_first_pair_where_multiqueue_was_not_agreed_on() {
    let mut rig = Rig::new(MERGE | 1 << VIRTIO_NET_F_CTRL_VQ, 3);
    rig.queues.truncate(3);
    rig.activate().unwrap();
    assert_eq!(rig.command(&[3, 0]), 0);
}

#[test]
fn unknown_and_short_commands_are_refused() {
    let mut rig = Rig::active(MULTI, 1);
    for command in [
        &[9, 9][..],
        &[4],
        &[4, 0, 1],
        &[5, 0, 1, 2, 3],
        &[4, 1, 1, 0],
    ] {
        assert_eq!(rig.command(command), 1, "{command:?}");
    }
}

#[test]
fn a_command_without_room_for_its_answer_breaks_the_device() {
    let mut rig = Rig::active(MULTI, 1);
    rig.queues[2].add(&[(0x8000, 4, 0)]);
    let error = rig.kick(2).unwrap_err();
    assert!(matches!(error, DeviceError::Driver { .. }), "{error}");
}

#[test]
fn the_tap_offloads_what_the_guest_takes_and_no_more() {
    let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let tso4 = 1 << VIRTIO_NET_F_GUEST_TSO4;
    let mut rig = Rig::active(
        MULTI | csum | tso4 | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        1,
    );
    assert_eq!(rig.settings[0].offloads(), TUN_F_CSUM | TUN_F_TSO4);
    let mut command = vec![5, 0];
    command.extend(u64::to_le_bytes(csum));
    assert_eq!(rig.command(&command), 0);
    assert_eq!(rig.settings[0].offloads(), TUN_F_CSUM);
    // Not negotiated.
    command[2..].copy_from_slice(&(1_u64 << VIRTIO_NET_F_GUEST_TSO6).to_le_bytes());
    assert_eq!(rig.command(&command), 1);
    rig.device(VirtioDevice::reset);
    rig.activate().unwrap();
    assert_eq!(rig.settings[0].offloads(), TUN_F_CSUM | TUN_F_TSO4);
}
