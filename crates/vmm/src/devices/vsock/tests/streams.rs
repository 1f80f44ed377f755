//! Data, credit and the ends of streams.

use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use std::net::Shutdown;

#[test]
fn a_host_reaches_a_guest_port_and_bytes_go_both_ways() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(52);
    host.write_all(b"to the guest").unwrap();
    let (header, data) = guest.recv().unwrap();
    assert_eq!((header.op, data.as_slice()), (op::RW, &b"to the guest"[..]));
    guest.send(socket.data(b"to the host"), b"to the host");
    let mut answer = [0; 11];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"to the host");
}

#[test]
fn data_sent_with_the_greeting_arrives() {
    let mut guest = Guest::new();
    let mut host = UnixStream::connect(&guest.path).unwrap();
    host.write_all(b"CONNECT 7\nat once").unwrap();
    let request = guest.expect(op::REQUEST);
    let socket = Socket {
        host_port: request.src_port,
        guest_port: 7,
    };
    guest.send(socket.packet(op::RESPONSE), &[]);
    assert_eq!(guest.recv().unwrap().1, b"at once");
}

#[test]
fn a_guest_that_refuses_closes_the_host_without_a_word() {
    let mut guest = Guest::new();
    let mut host = guest.host(1);
    let request = guest.expect(op::REQUEST);
    let socket = Socket {
        host_port: request.src_port,
        guest_port: 1,
    };
    guest.send(socket.packet(op::RST), &[]);
    assert!(is_closed(&mut host));
    assert_eq!(guest.rig.device(|shell| shell.device.connections()), 0);
}

#[test]
fn packets_of_no_connection_are_reset_but_resets_are_not() {
    let mut guest = Guest::new();
    let nobody = Socket {
        host_port: 9,
        guest_port: 8,
    };
    for op in [op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_REQUEST, 77] {
        guest.send(nobody.packet(op), &[]);
        let reset = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (9, 8));
    }
    guest.send(nobody.packet(op::RST), &[]);
    assert!(guest.recv().is_none());
}

#[test]
fn guests_may_not_connect_unless_a_connector_lets_them() {
    let wanted = Socket {
        host_port: 80,
        guest_port: 1024,
    };
    let mut closed = Guest::new();
    closed.send(wanted.packet(op::REQUEST), &[]);
    closed.expect(op::RST);

    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("vm");
    let service = UnixListener::bind(dir.path().join("vm_80")).unwrap();
    let connector = Box::new(PathConnector::new(&base));
    let mut open = Guest::with(VsockLimits::default(), Some(connector));
    open.send(wanted.packet(op::REQUEST), &[]);
    open.expect(op::RESPONSE);
    let (mut host, _) = service.accept().unwrap();
    host.write_all(b"welcome").unwrap();
    assert_eq!(open.recv().unwrap().1, b"welcome");
    let elsewhere = Socket {
        host_port: 81,
        ..wanted
    };
    open.send(elsewhere.packet(op::REQUEST), &[]);
    open.expect(op::RST);
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(5);
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.recv().unwrap().1, b"last words");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(socket.data(b"still here"), b"still here");
    guest.send(socket.shutdown(SHUTDOWN_SEND), &[]);
    let mut rest = String::new();
    host.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "still here");
}

#[test]
fn a_guest_that_stops_receiving_fails_the_hosts_writes() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(5);
    guest.send(socket.shutdown(SHUTDOWN_RECEIVE), &[]);
    assert!(host.write_all(b"x").is_err());
    guest.send(socket.data(b"y"), b"y");
    let mut byte = [0];
    host.read_exact(&mut byte).unwrap();
}

#[test]
fn a_host_that_closes_ends_both_directions_after_its_last_data() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(5);
    host.write_all(b"bye").unwrap();
    drop(host);
    assert_eq!(guest.recv().unwrap().1, b"bye");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.send(socket.packet(op::RST), &[]);
    assert_eq!(guest.rig.device(|shell| shell.device.connections()), 0);
    assert!(guest.recv().is_none());
}

#[test]
fn a_guest_that_never_confirms_the_end_is_reset() {
    let limits = VsockLimits {
        close_timeout: Duration::from_millis(20),
        ..VsockLimits::default()
    };
    let mut guest = Guest::with(limits, None);
    let (host, _) = guest.connect(5);
    drop(host);
    guest.expect(op::SHUTDOWN);
    while guest.rig.device(|shell| shell.device.connections()) > 0 {
        guest.rig.wait();
    }
    guest.expect(op::RST);
}

#[test]
fn hosts_are_held_to_the_guests_credit() {
    let mut guest = Guest::new();
    let mut host = guest.host(5);
    let request = guest.expect(op::REQUEST);
    let socket = Socket {
        host_port: request.src_port,
        guest_port: 5,
    };
    let small = Header {
        buf_alloc: 10,
        ..socket.packet(op::RESPONSE)
    };
    guest.send(small, &[]);
    host.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(guest.recv().unwrap().1, b"0123456789");
    assert!(guest.recv().is_none());
    let update = Header {
        buf_alloc: 10,
        fwd_cnt: 4,
        ..socket.packet(op::CREDIT_UPDATE)
    };
    guest.send(update, &[]);
    assert_eq!(guest.recv().unwrap().1, b"abcd");
    assert!(guest.recv().is_none());
    // A count from the future starves nobody but the guest itself.
    let absurd = Header {
        fwd_cnt: 1 << 31,
        ..update
    };
    guest.send(absurd, &[]);
    assert!(guest.recv().is_none());
}

#[test]
fn a_slow_host_loses_nothing_and_the_guest_hears_when_there_is_room() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(5);
    let (mut sent, mut told, mut alloc, mut got) = (0_u32, 0_u32, 0, Vec::new());
    guest.send(socket.packet(op::CREDIT_REQUEST), &[]);
    let total = 4 << 20;
    while got.len() < total {
        while let Some((update, _)) = guest.recv() {
            assert_eq!(update.op, op::CREDIT_UPDATE);
            (told, alloc) = (update.fwd_cnt, update.buf_alloc);
        }
        let credit = alloc - (sent - told);
        let len = credit.min(60_000).min(total as u32 - sent);
        if len > 0 {
            let payload: Vec<u8> = (sent..sent + len).map(|at| (at % 251) as u8).collect();
            guest.send(socket.data(&payload), &payload);
            sent += len;
        } else {
            // The guest may send no more: only now does the host read a little.
            let mut some = vec![0; 100_000];
            let read = host.read(&mut some).unwrap();
            got.extend_from_slice(&some[..read]);
        }
    }
    let right = got
        .iter()
        .zip(0_u32..)
        .all(|(&byte, at)| byte == (at % 251) as u8);
    assert!(right);
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(5);
    let payload = vec![7; 64 << 10];
    let reset = (0..100).find_map(|_| {
        guest.send(socket.data(&payload), &payload);
        guest.recv().filter(|(header, _)| header.op == op::RST)
    });
    assert!(reset.is_some());
    // What had already reached the host's socket can still be read, then it ends.
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert!(all.len() < 100 * payload.len());
}

#[test]
fn what_a_guest_sent_before_it_closed_reaches_a_slow_host() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(5);
    let payload = vec![9; 60_000];
    let mut sent = 0;
    // More than the socket takes, so that the rest is buffered in the device.
    for _ in 0..7 {
        guest.send(socket.data(&payload), &payload);
        sent += payload.len();
    }
    guest.send(socket.shutdown(SHUTDOWN_BOTH), &[]);
    while guest.recv().is_some_and(|(header, _)| header.op != op::RST) {}
    assert_eq!(guest.rig.device(|shell| shell.device.connections()), 1);
    let mut got = 0;
    let mut some = vec![0; 50_000];
    loop {
        let read = host.read(&mut some).unwrap();
        if read == 0 {
            break;
        }
        got += read;
        guest.rig.run();
    }
    assert_eq!(got, sent);
    assert_eq!(guest.rig.device(|shell| shell.device.connections()), 0);
}

#[test]
fn a_flood_on_one_connection_does_not_starve_another() {
    let mut guest = Guest::new();
    let (mut loud, _) = guest.connect(1);
    let (mut quiet, _) = guest.connect(2);
    loud.set_nonblocking(true).unwrap();
    while loud.write(&[1; 4096]).is_ok() {}
    quiet.write_all(b"me too").unwrap();
    // All receive buffers are filled by now; the quiet one waits for two of them at most.
    let ports: Vec<_> = (0..RING)
        .map_while(|_| guest.recv_keeping_buffer())
        .map(|(header, ..)| header.dst_port)
        .collect();
    guest.post_buffers();
    let next: Vec<_> = (0..3)
        .filter_map(|_| guest.recv())
        .map(|(header, _)| header.dst_port)
        .collect();
    assert!(
        ports.contains(&2) || next.contains(&2),
        "{ports:?} {next:?}"
    );
}
