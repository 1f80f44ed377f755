//! Pause, save, restore, reset, limits and cost.

use super::*;

#[test]
fn a_connection_that_waits_for_the_guest_survives_a_pause() {
    let limits = VsockLimits {
        connect_timeout: Duration::from_millis(80),
        ..VsockLimits::default()
    };
    let mut guest = Guest::with(limits, None);
    let mut host = guest.host(5);
    let request = guest.expect(op::REQUEST);
    guest.rig.pause();
    std::thread::sleep(Duration::from_millis(120));
    guest.rig.run();
    guest.rig.resume();
    guest.rig.run();
    let socket = Socket {
        host_port: request.src_port,
        guest_port: 5,
    };
    guest.send(socket.packet(op::RESPONSE), &[]);
    assert!(read_line(&mut host).starts_with("OK "));
}

#[test]
fn a_paused_device_touches_neither_queues_nor_ram_and_misses_nothing() {
    let mut guest = Guest::new();
    let (mut host, _) = guest.connect(5);
    guest.rig.pause();
    let before = guest.rig.save();
    host.write_all(b"meanwhile").unwrap();
    let mut late = UnixStream::connect(&guest.path).unwrap();
    writeln!(late, "CONNECT 6").unwrap();
    guest.rig.run();
    assert_eq!(guest.rig.save(), before);
    assert!(guest.recv_keeping_buffer().is_none());
    guest.rig.resume();
    assert_eq!(guest.recv().unwrap().1, b"meanwhile");
    guest.expect(op::REQUEST);
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let limits = VsockLimits {
        connect_timeout: Duration::from_millis(20),
        ..VsockLimits::default()
    };
    let mut guest = Guest::with(limits, None);
    let mut host = guest.host(5);
    guest.expect(op::REQUEST);
    while guest.rig.device(|shell| shell.device.connections()) > 0 {
        guest.rig.wait();
    }
    assert!(is_closed(&mut host));
    guest.expect(op::RST);
}

#[test]
fn a_host_that_never_says_what_it_wants_is_closed() {
    let limits = VsockLimits {
        greeting_timeout: Duration::from_millis(20),
        ..VsockLimits::default()
    };
    let mut guest = Guest::with(limits, None);
    let mut host = UnixStream::connect(&guest.path).unwrap();
    host.write_all(b"CONN").unwrap();
    guest.rig.run();
    while guest.rig.device(|shell| shell.device.connections()) > 0 {
        guest.rig.wait();
    }
    assert!(is_closed(&mut host));
    assert!(guest.recv().is_none());
}

#[test]
fn a_restored_guest_hears_at_once_that_its_connections_are_gone() {
    let mut parent = Guest::new();
    let (mut host, old) = parent.connect(5);
    let mut clone = parent.restore();
    let (head, len) = clone.rig.queues[EVENT].take_used().unwrap();
    assert_eq!(len, 4);
    let at = GuestAddress(clone.rig.queues[EVENT].buffer_of(head));
    assert_eq!(clone.rig.ram.read_obj::<u32>(at).unwrap(), 0);
    // What the driver had under way is reset.
    clone.send(old.data(b"x"), b"x");
    clone.expect(op::RST);
    // The parent's stream is the parent's alone.
    host.write_all(b"?").unwrap();
    clone.rig.run();
    assert!(clone.recv().is_none());
}

#[test]
fn hosts_wait_until_a_restored_guest_has_heard() {
    let mut parent = Guest::new();
    let (_host, old) = parent.connect(5);
    let mut clone = parent.restore();
    let mut host = clone.host(5);
    assert!(clone.recv().is_none());
    let (head, _) = clone.rig.queues[EVENT].take_used().unwrap();
    let at = clone.rig.queues[EVENT].buffer_of(head);
    clone.rig.queues[EVENT].offer(&[(at, 8, true)]);
    clone.rig.kick(EVENT as u16);
    let request = clone.expect(op::REQUEST);
    assert_ne!(request.src_port, old.host_port);
    let socket = Socket {
        host_port: request.src_port,
        guest_port: 5,
    };
    clone.send(socket.packet(op::RESPONSE), &[]);
    assert!(read_line(&mut host).starts_with("OK "));
}

#[test]
fn a_late_driver_keeps_hosts_out_for_a_while_and_then_ends_who_was_let_in() {
    let mut parent = Guest::new();
    parent.connect(5);
    let mut clone = parent.restore();
    let mut host = clone.host(5);
    let deadline = std::time::Instant::now() + 5 * RESET_TIMEOUT;
    let request = loop {
        clone.rig.wait();
        if let Some((packet, _)) = clone.recv() {
            break packet;
        }
        assert!(std::time::Instant::now() < deadline);
    };
    assert_eq!(request.op, op::REQUEST);
    // It closes all that it has, and says nothing of it: the host must not wait for ever.
    let (head, _) = clone.rig.queues[EVENT].take_used().unwrap();
    let at = clone.rig.queues[EVENT].buffer_of(head);
    clone.rig.queues[EVENT].offer(&[(at, 8, true)]);
    clone.rig.kick(EVENT as u16);
    assert!(is_closed(&mut host));
    clone.connect(6);
}

#[test]
fn a_restore_in_the_middle_of_a_restore_still_tells_the_guest() {
    let mut parent = Guest::new();
    parent.connect(5);
    let mut child = parent.restore();
    let (bytes, _) = child.rig.save();
    assert!(VsockState::decode(&bytes).unwrap().transport_reset);
}

#[test]
fn packets_that_waited_at_the_save_are_answered_after_the_restore() {
    let mut parent = Guest::new();
    let (_host, old) = parent.connect(5);
    // Queued, but the kick was lost in the save.
    parent.queue_packet(old.data(b"y"), b"y");
    let mut clone = parent.restore();
    clone.expect(op::RST);
}

#[test]
fn a_device_that_is_put_back_ends_its_connections_and_gives_no_port_twice() {
    let mut guest = Guest::new();
    let (bytes, _) = guest.rig.save();
    guest.rig.resume();
    let (mut host, socket) = guest.connect(5);
    guest.rig.save();
    let saved = guest.rig.device(|shell| {
        shell.device.reset();
        shell.device.restore(&bytes).unwrap();
        shell.device.save().unwrap()
    });
    assert!(is_closed(&mut host));
    let saved = VsockState::decode(&saved).unwrap();
    assert!(saved.transport_reset);
    assert!(saved.next_host_port > socket.host_port);
    let unchanged = guest.rig.device(|shell| {
        assert!(shell.device.restore(&bytes[1..]).is_err());
        shell.device.save().unwrap()
    });
    assert_eq!(VsockState::decode(&unchanged).unwrap(), saved);
}

#[test]
fn a_device_that_no_driver_used_has_nothing_to_tell() {
    let (_dir, _path, listener) = listener();
    let device = Vsock::new(VsockResources::new(listener), 7).unwrap();
    let state = VsockState::decode(&device.save().unwrap()).unwrap();
    assert_eq!(state, VsockState::fresh(7));
    let mut config = [0xff; 10];
    device.read_config(0, &mut config);
    assert_eq!(config, [7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 10]);
}

#[test]
fn a_reset_ends_all_connections_and_the_next_driver_starts_afresh() {
    let mut guest = Guest::new();
    let (mut host, _) = guest.connect(5);
    guest.rig.device(|shell| shell.device.reset());
    assert!(is_closed(&mut host));
    assert!(guest.rig.device(|shell| shell.device.queues().is_empty()));
    guest.rig.activate_again();
    guest.post_buffers();
    guest.connect(6);
    assert!(guest.rig.queues[EVENT].take_used().is_none());
}

#[test]
fn connections_beyond_the_limit_are_closed_at_once() {
    let limits = VsockLimits {
        max_connections: 2,
        ..VsockLimits::default()
    };
    let mut guest = Guest::with(limits, None);
    let (one, _) = guest.connect(1);
    let (_two, _) = guest.connect(2);
    let mut three = guest.host(3);
    assert!(is_closed(&mut three));
    drop(one);
    guest.expect(op::SHUTDOWN);
}

#[test]
fn thousands_of_connections_live_side_by_side() {
    let nofile = rustix::process::Resource::Nofile;
    let mut limit = rustix::process::getrlimit(nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(nofile, limit).unwrap();
    let count = 2000;
    assert!(limit.current.is_none_or(|most| most > 2 * count + 100));
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..count).map(|port| guest.connect(port as u32)).collect();
    for (host, socket) in &mut streams {
        let word = socket.guest_port.to_le_bytes();
        guest.send(socket.data(&word), &word);
        let mut echo = [0; 4];
        host.read_exact(&mut echo).unwrap();
        assert_eq!(echo, word);
    }
    drop(streams);
    for _ in 0..count {
        guest.expect(op::SHUTDOWN);
    }
}

#[test]
fn many_packets_cost_one_interrupt_and_silence_costs_nothing() {
    let mut guest = Guest::new();
    let (mut host, _) = guest.connect(5);
    let before = guest.rig.interrupt.queue_count();
    host.write_all(&[1; 20 * 4096]).unwrap();
    guest.rig.run();
    let packets = std::iter::from_fn(|| guest.recv_keeping_buffer()).count();
    assert_eq!(packets, 20);
    // Without event indices every call interrupts for both queues.
    assert!(guest.rig.interrupt.queue_count() - before <= 2);
    let idle = guest.rig.interrupt.queue_count();
    guest.rig.run();
    assert_eq!(guest.rig.interrupt.queue_count(), idle);
}
