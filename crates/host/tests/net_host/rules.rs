//! The packet filter's rules: what happens when somebody removes them, what others' rules do, and
//! what guests may use up.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use clone_api::config::Egress;
use clone_host::host_net::{BRIDGE, Request};

use crate::wire::{Guest, IPV4, in_new_network, run};
use crate::world::{UPLINK, WORLD, World};
use crate::{guest, host, request};

/// A socket of the host's that guests send to.
fn server() -> UdpSocket {
    let server = UdpSocket::bind(("0.0.0.0", 9)).unwrap();
    server
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    server
}

/// Whether the guest's datagram reaches the world, and the answer the guest.
fn reaches(guest: &mut Guest, world: &World) -> (bool, bool) {
    let mac = guest.finds(guest.gateway()).expect("ARP is answered");
    run(&format!(
        "ip neigh replace {} lladdr {} dev {BRIDGE}",
        guest.address, guest.mac
    ));
    guest.drain();
    guest.datagram(mac, guest.address, (WORLD, 9), b"question");
    let Some((_, from)) = world.hears() else {
        return (false, false);
    };
    world.socket.send_to(b"answer", from).unwrap();
    (true, guest.hears_datagram().is_some())
}

/// Whether datagrams to ports of the host arrive, by address and port.
fn arrive(guest: &mut Guest, to: &[(Ipv4Addr, u16)]) -> Vec<bool> {
    let mac = guest.finds(guest.gateway()).expect("ARP is answered");
    let mut arrived = Vec::new();
    for &(address, port) in to {
        let listening = UdpSocket::bind((address, port)).unwrap();
        listening
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        guest.datagram(mac, guest.address, (address, port), b"question");
        arrived.push(listening.recv_from(&mut [0; 16]).is_ok());
    }
    arrived
}

#[test]
fn the_hosts_own_addresses_are_closed_but_for_names_unless_they_are_opened() {
    in_new_network(|| {
        let (host, dir) = host();
        let world = World::new();
        run("ip address add 198.51.100.7/32 dev lo");
        let closed = Request {
            reach_host: false,
            ..request("closed")
        };
        let mut closed = Guest::new(host.attach(&closed).unwrap());
        let mut open = guest(&host, "open");
        let own = |guest: &Guest| {
            let other = Ipv4Addr::new(198, 51, 100, 7);
            [(guest.gateway(), 9), (UPLINK, 9), (other, 9), (other, 53)]
        };
        let all = own(&closed);
        assert_eq!(arrive(&mut closed, &all), [false, false, false, true]);
        assert_eq!(arrive(&mut open, &all), [true; 4]);
        // The world is another matter, and a redirection to the host is no way around.
        assert_eq!(reaches(&mut closed, &world), (true, true));
        run("nft add table ip theirs");
        run("nft add chain ip theirs to { type nat hook prerouting priority dstnat; }");
        run("nft add rule ip theirs to ip daddr 198.51.100.7 udp dport 9 dnat to 192.0.2.2:9");
        let mac = closed.finds(closed.gateway()).unwrap();
        let redirected = (Ipv4Addr::new(198, 51, 100, 7), 9);
        closed.datagram(mac, closed.address, redirected, b"detour");
        assert_eq!(world.hears(), None);
        run("nft delete table ip theirs");
        // The host opens connections to its guests, and gets answers.
        let asking = UdpSocket::bind((closed.gateway(), 900)).unwrap();
        asking
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        closed.drain();
        asking.send_to(b"question", (closed.address, 4000)).unwrap();
        assert!(closed.hears_datagram().is_some());
        closed.datagram(mac, closed.address, (closed.gateway(), 900), b"answer");
        asking.recv_from(&mut [0; 16]).unwrap();
        // It changes while the guest runs, and a repair keeps it.
        for (reach_host, arrives) in [(true, [true; 4]), (false, [false, false, false, true])] {
            host.restrict("closed", &Egress::Full, reach_host).unwrap();
            assert_eq!(arrive(&mut closed, &all), arrives);
            run("nft flush ruleset");
            assert!(host.repair().unwrap());
            assert_eq!(arrive(&mut closed, &all), arrives);
            assert_eq!(arrive(&mut open, &all), [true; 4]);
        }
        drop((closed, open));
        host.detach("open").unwrap();
        host.detach("closed").unwrap();
        crate::assert_nothing_left(dir.path());
    });
}

#[test]
fn without_its_rules_nothing_passes_and_a_repair_brings_all_back() {
    in_new_network(|| {
        let (host, _dir) = host();
        let world = World::new();
        let mut web = guest(&host, "web");
        let only = Request {
            egress: Egress::Allow(vec!["198.51.100.0/24".parse().unwrap()]),
            ..request("held")
        };
        let mut held = Guest::new(host.attach(&only).unwrap());
        assert_eq!(reaches(&mut web, &world), (true, true));
        assert_eq!(reaches(&mut held, &world), (false, false));
        run("nft flush ruleset");
        assert_eq!(reaches(&mut web, &world), (false, false));
        assert_eq!(reaches(&mut held, &world), (false, false));
        // Nobody gets in, be it from the world or from this host.
        world
            .socket
            .send_to(b"intrusion", (web.address, 7))
            .unwrap();
        server().send_to(b"intrusion", (web.address, 7)).unwrap();
        assert_eq!(web.hears_datagram(), None);
        // Nor does a guest speak for another.
        let listening = server();
        let gateway = web.gateway();
        let mac = web.finds(gateway).unwrap();
        web.datagram(mac, held.address, (gateway, 9), b"lie");
        let mut text = [0; 16];
        listening.recv_from(&mut text).unwrap_err();
        assert!(host.repair().unwrap());
        assert_eq!(reaches(&mut web, &world), (true, true));
        assert_eq!(reaches(&mut held, &world), (false, false));
        assert!(!host.repair().unwrap(), "there is nothing left to do");
    });
}

#[test]
fn rules_that_somebody_removes_are_back_within_seconds() {
    in_new_network(|| {
        let (host, _dir) = host();
        let world = World::new();
        let mut web = guest(&host, "web");
        let watch = host.watch().unwrap();
        let changes = [
            "nft flush ruleset",
            "nft delete table inet clone",
            "nft flush chain inet clone forward",
        ];
        for change in changes {
            run(change);
            let end = Instant::now() + Duration::from_secs(10);
            while reaches(&mut web, &world) != (true, true) {
                assert!(Instant::now() < end, "{change}");
            }
        }
        drop(watch);
        run("nft flush ruleset");
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(reaches(&mut web, &world), (false, false));
    });
}

#[test]
fn rules_that_somebody_removed_come_back_with_the_next_guest() {
    in_new_network(|| {
        let (host, _dir) = host();
        let world = World::new();
        let mut first = guest(&host, "first");
        run("nft flush ruleset");
        // So do the programs on taps, should somebody remove those.
        run(&format!(
            "tc qdisc del dev {} clsact",
            first.attachment.tap_name
        ));
        let _second = guest(&host, "second");
        assert_eq!(reaches(&mut first, &world), (true, true));
        let gateway = first.gateway();
        first.ask(gateway, first.mac, Ipv4Addr::new(10, 213, 0, 77));
        assert!(first.answer_from(gateway).is_none(), "the guard is back");
    });
}

#[test]
fn changes_of_others_rules_leave_ours_alone() {
    in_new_network(|| {
        let (host, _dir) = host();
        let _web = guest(&host, "web");
        let before = run("nft -a list table inet clone");
        run("nft add table inet theirs");
        assert!(!host.repair().unwrap());
        assert_eq!(run("nft -a list table inet clone"), before);
    });
}

#[test]
fn a_firewall_that_cuts_guests_off_is_named_with_what_helps() {
    in_new_network(|| {
        let (host, _dir) = host();
        let notices = |vm: &str| host.attach(&request(vm)).unwrap().notices.concat();
        assert!(!notices("before").contains("forwarded"));
        run("nft add table ip filter");
        run(
            "nft add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }",
        );
        let plain = notices("plain");
        assert!(
            plain.contains("chain FORWARD of table ip filter"),
            "{plain}"
        );
        assert!(plain.contains("bridge=NAME"), "{plain}");
        // The same for everybody, as long as it is so.
        assert_eq!(notices("again"), plain);
        run("nft add chain ip filter DOCKER-USER");
        assert!(notices("docker").contains("-I DOCKER-USER -i clone0 -j ACCEPT"));
        run("nft add rule ip filter DOCKER-USER iifname clone0 accept");
        assert!(!notices("helped").contains("forwarded"));
        run("nft delete table ip filter");
        run("nft add table inet firewalld");
        run(
            "nft add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; policy accept; }",
        );
        run("nft add rule inet firewalld filter_FORWARD ct state established accept");
        assert!(!notices("open").contains("forwarded"));
        run(
            "nft add rule inet firewalld filter_FORWARD counter reject with icmpx type admin-prohibited",
        );
        assert!(notices("zone").contains("--zone=trusted"));
    });
}

/// The connections in the host's table that a guest opened.
fn connections_of(guest: &Guest) -> usize {
    let source = format!("src={} ", guest.address);
    // Each connection is a line, with the addresses of both ways.
    fs::read_to_string("/proc/thread-self/net/nf_conntrack")
        .unwrap()
        .lines()
        .filter(|line| {
            line.split_once(&source)
                .is_some_and(|(before, _)| !before.contains("src="))
        })
        .count()
}

#[test]
fn a_guest_that_opens_too_many_connections_is_alone_with_it() {
    in_new_network(|| {
        let (host, dir) = host();
        let few = Request {
            connections: Some(20),
            ..request("few")
        };
        let mut few = Guest::new(host.attach(&few).unwrap());
        let mut usual = guest(&host, "usual");
        let gateway = few.gateway();
        let mac = few.finds(gateway).unwrap();
        usual.finds(gateway).unwrap();
        // One that goes both ways before the flood.
        let old = UdpSocket::bind((gateway, 999)).unwrap();
        old.set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let mut text = [0; 16];
        few.datagram(mac, few.address, (gateway, 999), b"hello");
        let (_, from) = old.recv_from(&mut text).unwrap();
        run(&format!(
            "ip neigh replace {} lladdr {} dev {BRIDGE}",
            few.address, few.mac
        ));
        old.send_to(b"answer", from).unwrap();
        let flood = |guest: &mut Guest, ports: u16| {
            for port in 1000..1000 + ports {
                guest.datagram(mac, guest.address, (gateway, port), b"hello");
            }
        };
        flood(&mut few, 200);
        flood(&mut usual, 200);
        assert_eq!((connections_of(&few), connections_of(&usual)), (20, 200));
        let server = server();
        few.datagram(mac, few.address, (gateway, 9), b"one more");
        server.recv_from(&mut text).unwrap_err();
        usual.datagram(mac, usual.address, (gateway, 9), b"one more");
        server.recv_from(&mut text).unwrap();
        // The one that it had goes on.
        few.datagram(mac, few.address, (gateway, 999), b"hello again");
        old.recv_from(&mut text).unwrap();
        // So it is with the limit that all have.
        flood(&mut usual, 6000);
        let usual_count = connections_of(&usual);
        assert!((4000..=4096).contains(&usual_count), "{usual_count}");
        drop((few, usual));
        host.detach("few").unwrap();
        assert!(!run("nft list table inet clone").contains("count over 20"));
        host.detach("usual").unwrap();
        crate::assert_nothing_left(dir.path());
    });
}

/// A connection's first packet, which offers segments of 1,460 bytes.
fn opening(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 44, 0, 0, 0, 0, 64, 6, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    let checksum = |bytes: &[u8], start: u32| {
        let sum: u32 = bytes
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum::<u32>()
            + start;
        !((sum & 0xffff) + (sum >> 16)) as u16
    };
    let sum = checksum(&packet, 0);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut segment = [4000_u16.to_be_bytes(), 80_u16.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend([2, 4]);
    segment.extend(1460_u16.to_be_bytes());
    let pseudo = [&from.octets()[..], &to.octets()].concat();
    let sum = checksum(&[&pseudo[..], &segment].concat(), 6 + segment.len() as u32);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    packet.extend(segment);
    packet
}

#[test]
fn a_small_way_out_makes_small_packets() {
    in_new_network(|| {
        let (host, _dir) = host();
        let world = World::new();
        let mut early = guest(&host, "early");
        assert_eq!(early.attachment.mtu, None);
        run("ip link set uplink mtu 1400");
        let late = guest(&host, "late");
        assert_eq!(late.attachment.mtu, Some(1400));
        let tap = run(&format!("ip link show dev {}", late.attachment.tap_name));
        assert!(tap.contains("mtu 1400"), "{tap}");
        // A guest that was there before hears of it with each connection.
        let mac = early.finds(early.gateway()).unwrap();
        world.sniffer.frames();
        let packet = opening(early.address, WORLD);
        early.send(mac.0, early.mac.0, IPV4, &packet);
        let end = Instant::now() + Duration::from_secs(2);
        let segment = loop {
            assert!(Instant::now() < end, "the packet did not come");
            let frames = world.sniffer.frames();
            if let Some(frame) = frames.into_iter().find(|frame| frame[23] == 6) {
                break u16::from_be_bytes([frame[56], frame[57]]);
            }
        };
        assert_eq!(segment, 1360);
        // A way out that is narrower for one network only.
        run("ip link set uplink mtu 1500");
        run(&format!("ip route replace default via {WORLD} mtu 1280"));
        assert_eq!(guest(&host, "later").attachment.mtu, Some(1280));
    });
}
