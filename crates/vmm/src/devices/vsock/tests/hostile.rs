//! Drivers and guests that break the rules.

use super::*;
use proptest::prelude::*;

/// Offers one chain on a queue and tells what the device says.
fn offered(queue: usize, buffers: &[(u64, u32, bool)]) -> Option<String> {
    let mut guest = Guest::new();
    guest.rig.queues[queue].offer(buffers);
    guest.rig.kick(queue as u16);
    guest.rig.error()
}

#[test]
fn packets_that_lie_about_their_size_break_the_device() {
    let at = TX_AT;
    let header = HEADER_LEN as u32;
    assert!(offered(TX, &[(at, header, false)]).is_none());
    for bad in [
        &[(at, header - 1, false)][..],
        &[(at, 0, false)],
        &[(at, header, true)],
        &[(u64::MAX - 10, header, false)],
        &[(0x3f_fff0, header, false)],
        &[(at, u32::MAX, false)],
        &[(at, 8, true), (at, header, false)],
    ] {
        assert!(offered(TX, bad).is_some(), "{bad:?}");
    }
    let mut guest = Guest::new();
    let (_host, socket) = guest.connect(5);
    let mut header = socket.data(b"");
    header.len = u32::MAX;
    guest.queue_packet(header, b"short");
    guest.rig.kick(TX as u16);
    assert!(guest.rig.error().unwrap().contains("less than"));
}

#[test]
fn chains_without_an_end_break_the_device() {
    use crate::virtio::driver::{INDIRECT, NEXT};
    for (flags, next) in [(NEXT, 0), (NEXT, 999), (INDIRECT, 0), (NEXT | INDIRECT, 0)] {
        let mut guest = Guest::new();
        let tx = &mut guest.rig.queues[TX];
        tx.descriptor(0, TX_AT, 17, flags, next);
        tx.make_available(0);
        guest.rig.kick(TX as u16);
        assert!(guest.rig.error().is_some(), "{flags} {next}");
    }
    let mut guest = Guest::new();
    guest.rig.queues[TX].make_available(RING + 1);
    guest.rig.kick(TX as u16);
    assert!(guest.rig.error().is_some());
}

#[test]
fn an_index_that_jumps_breaks_the_device() {
    let mut guest = Guest::new();
    guest.rig.queues[TX].set_avail_index(RING + 1);
    guest.rig.kick(TX as u16);
    assert!(guest.rig.error().is_some());
}

#[test]
fn receive_buffers_without_room_break_the_device() {
    let (_dir, path, listener) = listener();
    let device = Vsock::new(VsockResources::new(listener), 3).unwrap();
    let mut rig = Rig::new(device, ram(1 << 20), RING, 0);
    rig.queues[RX].offer(&[(0x8_0000, HEADER_LEN as u32, true)]);
    let mut host = UnixStream::connect(path).unwrap();
    writeln!(host, "CONNECT 1").unwrap();
    rig.run();
    assert!(rig.error().is_some());
}

#[test]
fn a_guest_that_takes_no_answers_waits_itself() {
    let mut guest = Guest::new();
    // Use up every receive buffer without giving one back, then go on asking.
    let nobody = Socket {
        host_port: 9,
        guest_port: 8,
    };
    let mut taken = 0;
    for _ in 0..1000 {
        guest.queue_packet(nobody.packet(op::RW), &[]);
        guest.rig.kick(TX as u16);
        if guest.rig.queues[TX].take_used().is_none() {
            break;
        }
        taken += 1;
    }
    assert!(taken < 500, "answers pile up without bound");
    assert_eq!(guest.rig.error(), None);
    let before = std::iter::from_fn(|| guest.recv_keeping_buffer()).count();
    assert_eq!(before, usize::from(RING));
    guest.post_buffers();
    // With room for answers it goes on where it stopped.
    assert!(guest.rig.queues[TX].take_used().is_some());
}

#[test]
fn foreign_context_ids_and_socket_types_get_nowhere() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(5);
    let data = socket.data(b"x");
    guest.send(Header { src_cid: 4, ..data }, b"x");
    assert!(guest.recv().is_none());
    let (reset, _) = {
        guest.send(
            Header {
                socket_type: 2,
                ..data
            },
            b"x",
        );
        guest.recv().unwrap()
    };
    assert_eq!((reset.op, reset.socket_type), (op::RST, 2));
    host.set_nonblocking(true).unwrap();
    assert!(host.read(&mut [0]).is_err());
}

#[test]
fn a_flood_of_large_packets_gives_others_their_turn() {
    let mut guest = Guest::new();
    let payload = vec![0; 512 << 10];
    let header = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: 5,
        dst_port: 6,
        len: payload.len() as u32,
        socket_type: TYPE_STREAM,
        // To nobody: it needs no answer.
        op: op::RST,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    for _ in 0..40 {
        guest.queue_packet(header, &payload);
    }
    guest
        .rig
        .device(|shell| shell.device.notify_queue(TX as u16))
        .unwrap();
    let used = &mut guest.rig.queues[TX];
    assert_eq!(std::iter::from_fn(|| used.take_used()).count(), 16);
    guest.rig.run();
    let used = &mut guest.rig.queues[TX];
    assert_eq!(std::iter::from_fn(|| used.take_used()).count(), 24);
}

fn any_packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let ops = prop_oneof![9 => 0_u16..9, 1 => any::<u16>()];
    let header = (
        ops,
        0_u32..4,
        any::<u32>(),
        any::<u32>(),
        0_usize..3,
        0_usize..200,
    );
    header.prop_map(|(op, flags, buf_alloc, fwd_cnt, which, len)| {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: 5,
            dst_port: (1 << 30) + which as u32,
            len: len as u32,
            socket_type: TYPE_STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        };
        (header, vec![op as u8; len])
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_order_of_packets_breaks_device_or_accounting(packets in prop::collection::vec(any_packet(), 1..60), hosts in 0_usize..3) {
        let mut guest = Guest::new();
        let mut streams: Vec<_> = (0..hosts).map(|_| guest.host(5)).collect();
        for (at, (header, payload)) in packets.into_iter().enumerate() {
            guest.send(header, &payload);
            if at == 20 {
                streams.pop();
            }
            if let Some(stream) = streams.first_mut() {
                let _ = stream.write(b"noise");
            }
            while guest.recv().is_some_and(|(header, _)| header.op == op::RST) {}
        }
        drop(streams);
        guest.rig.run();
        prop_assert_eq!(guest.rig.error(), None);
        guest.rig.device(|shell| shell.device.reset());
        prop_assert_eq!(guest.rig.device(|shell| shell.device.connections()), 0);
    }

    #[test]
    fn no_descriptor_chain_panics_the_device(
        descriptors in prop::collection::vec((0_u64..0x50_0000, prop_oneof![0_u32..5000, any::<u32>()], 0_u16..8, 0_u16..70), 1..64),
        heads in prop::collection::vec(0_u16..70, 1..64),
        queue in 0_usize..3,
    ) {
        let mut guest = Guest::new();
        let _host = guest.host(5);
        for (&(address, len, flags, next), index) in descriptors.iter().zip(0..) {
            guest.rig.queues[queue].descriptor(index, address, len, flags, next);
        }
        for head in heads {
            guest.rig.queues[queue].make_available(head);
        }
        for queue in 0..3 {
            guest.rig.kick(queue);
        }
    }
}
