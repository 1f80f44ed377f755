//! Frames that no guest has to send: each kind is dropped where it enters the host, so that
//! neither the host's stack, nor the bridge's table of stations, nor another guest sees it.

use std::net::Ipv4Addr;

use clone_api::config::Egress;
use clone_host::host_net::{BRIDGE, HostNet, Request};

use crate::wire::{ARP, Guest, IPV4, in_new_network, run};
use crate::world::Sniffer;
use crate::{guest, host, request};

/// Is in every frame that is sent here.
const MARKER: &[u8] = b"no guest sends this";

const GROUP: [u8; 6] = [0x01, 0x80, 0xc2, 0, 0, 0x0e];
const IPV6: [u8; 2] = [0x86, 0xdd];
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// Two guests that may reach each other and one that may not, and the host that they are on.
struct Scene {
    bad: Guest,
    friend: Guest,
    stranger: Guest,
    gateway: [u8; 6],
    _dir: tempfile::TempDir,
    _host: HostNet,
}

impl Scene {
    fn new(neighbours: bool, egress: Egress) -> Self {
        let (host, dir) = host();
        // A host that takes what it is offered.
        for setting in ["all/accept_ra", "default/accept_ra"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{setting}"), "2").unwrap();
        }
        let with = |vm: &str, neighbours, egress: &Egress| {
            let request = Request {
                neighbours,
                egress: egress.clone(),
                ..request(vm)
            };
            Guest::new(host.attach(&request).unwrap())
        };
        let mut bad = with("bad", neighbours, &egress);
        let friend = with("friend", true, &Egress::Full);
        let stranger = guest(&host, "stranger");
        let gateway = bad.finds(bad.gateway()).expect("the host answers").0;
        Self {
            bad,
            friend,
            stranger,
            gateway,
            _dir: dir,
            _host: host,
        }
    }

    /// Sends frames that must be seen nowhere.
    fn assert_unseen(&mut self, frames: Vec<(&str, Vec<u8>)>) {
        for (what, frame) in frames {
            let ether_type = u16::from_be_bytes([frame[12], frame[13]]);
            let inner = u16::from_be_bytes([frame[16], frame[17]]);
            let sniffers = [ether_type, inner]
                .map(i32::from)
                .into_iter()
                .chain([libc::ETH_P_802_3, libc::ETH_P_802_2])
                .filter(|kind| *kind > 0)
                .map(Sniffer::new)
                .collect::<Vec<_>>();
            let before = stations();
            assert!(frame.windows(MARKER.len()).any(|it| it == MARKER), "{what}");
            self.bad.send_raw(&frame);
            // What was sent before this has been dealt with when this is answered.
            let gateway = self.bad.gateway();
            assert!(self.bad.finds(gateway).is_some(), "{what}: cut off");
            for sniffer in &sniffers {
                let seen = sniffer.frames().into_iter().any(|frame| is_marked(&frame));
                assert!(!seen, "{what}: seen by the host");
            }
            assert!(
                self.friend.drain().iter().all(|it| !is_marked(it)),
                "{what}: seen by a neighbour"
            );
            assert!(
                self.stranger.drain().iter().all(|it| !is_marked(it)),
                "{what}: seen by a guest"
            );
            assert_eq!(stations(), before, "{what}: learned by the bridge");
        }
    }
}

fn is_marked(frame: &[u8]) -> bool {
    frame.windows(MARKER.len()).any(|it| it == MARKER)
}

fn stations() -> Vec<String> {
    let mut stations: Vec<_> = run("bridge fdb show").lines().map(str::to_owned).collect();
    stations.sort();
    stations
}

fn frame(to: [u8; 6], from: [u8; 6], kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &from, &kind, payload].concat();
    frame.extend(MARKER);
    frame.resize(frame.len().max(60), 0);
    frame
}

/// An IPv4 packet with a right checksum, and `first` as its first byte.
fn ipv4(
    first: u8,
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    options: &[u8],
    rest: &[u8],
) -> Vec<u8> {
    let len = (20 + options.len() + rest.len() + MARKER.len()) as u16;
    let mut header = vec![first, 0];
    header.extend(len.to_be_bytes());
    header.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    header.extend(options);
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&folded.to_be_bytes());
    [&header[..], rest].concat()
}

fn udp(from: u16, to: u16) -> Vec<u8> {
    let mut header = from.to_be_bytes().to_vec();
    header.extend(to.to_be_bytes());
    header.extend(((8 + MARKER.len()) as u16).to_be_bytes());
    header.extend([0, 0]);
    header
}

fn arp(operation: u8, mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut payload = vec![0, 1, 8, 0, 6, 4, 0, operation];
    payload.extend(mac);
    payload.extend(from.octets());
    payload.extend([0; 6]);
    payload.extend(to.octets());
    payload
}

/// An IPv6 packet; its checksum is left wrong where only the way to a checksum is tried.
fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
    let len = ((payload.len() + MARKER.len()) as u16).to_be_bytes();
    let source = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
    let all = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    [
        &[0x60, 0, 0, 0][..],
        &len,
        &[next, 255],
        &source,
        &all,
        payload,
    ]
    .concat()
}

#[test]
fn groups_that_bridges_do_not_forward_are_no_way_to_the_host() {
    for egress in [Egress::None, Egress::Full] {
        in_new_network(move || {
            let mut scene = Scene::new(false, egress);
            let (own, address) = (scene.bad.mac.0, scene.bad.address);
            let (mac, victim) = (scene.friend.mac.0, scene.friend.address);
            let host = scene.bad.gateway();
            let mut frames = Vec::new();
            for last in 0..16 {
                let group = [0x01, 0x80, 0xc2, 0, 0, last];
                let honest = ipv4(0x45, address, host, 17, &[], &udp(4000, 9));
                let forged = ipv4(0x45, victim, host, 17, &[], &udp(4000, 9));
                frames.push(("own addresses", frame(group, own, IPV4, &honest)));
                frames.push(("another's addresses", frame(group, mac, IPV4, &forged)));
                frames.push(("ARP", frame(group, own, ARP, &arp(1, own, address, host))));
                frames.push(("STP", frame(group, own, [0, 38], &[0x42, 0x42, 3, 0, 0])));
            }
            scene.assert_unseen(frames);
        });
    }
}

#[test]
fn tagged_frames_are_dropped() {
    for neighbours in [false, true] {
        in_new_network(move || {
            let mut scene = Scene::new(neighbours, Egress::Full);
            let (own, address) = (scene.bad.mac.0, scene.bad.address);
            let (to, host) = (scene.gateway, scene.bad.gateway());
            let packet = ipv4(0x45, address, host, 17, &[], &udp(4000, 9));
            let inside = |tag: &[u8]| [tag, &packet].concat();
            scene.assert_unseen(vec![
                ("802.1Q", frame(to, own, [0x81, 0], &inside(&[0, 7, 8, 0]))),
                (
                    "a priority",
                    frame(to, own, [0x81, 0], &inside(&[0xe0, 0, 8, 0])),
                ),
                (
                    "802.1ad",
                    frame(to, own, [0x88, 0xa8], &inside(&[0, 7, 8, 0])),
                ),
                (
                    "two tags",
                    frame(to, own, [0x88, 0xa8], &inside(&[0, 7, 0x81, 0, 0, 7, 8, 0])),
                ),
                (
                    "broadcast",
                    frame([0xff; 6], own, [0x81, 0], &inside(&[0, 7, 8, 0])),
                ),
            ]);
        });
    }
}

#[test]
fn other_protocols_are_dropped() {
    for neighbours in [false, true] {
        in_new_network(move || {
            let mut scene = Scene::new(neighbours, Egress::Full);
            let own = scene.bad.mac.0;
            let friend = scene.friend.mac.0;
            let mut frames = Vec::new();
            for (what, kind) in [
                ("802.3 with LLC", [0, 46]),
                ("pause", [0x88, 0x08]),
                ("LACP", [0x88, 0x09]),
                ("LLDP", [0x88, 0xcc]),
                ("EAPOL", [0x88, 0x8e]),
                ("PTP", [0x88, 0xf7]),
                ("CFM", [0x89, 0x02]),
                ("MPLS", [0x88, 0x47]),
                ("PPPoE", [0x88, 0x63]),
                ("RARP", [0x80, 0x35]),
                ("IPX", [0x81, 0x37]),
                ("FCoE", [0x89, 0x06]),
                ("loopback", [0x90, 0x00]),
                ("local experiment", [0x88, 0xb5]),
            ] {
                let payload = [0xaa, 0xaa, 3, 0, 0, 0, 8, 0];
                for to in [
                    scene.gateway,
                    friend,
                    GROUP,
                    [0xff; 6],
                    [1, 0, 0xc, 0xcc, 0xcc, 0xcc],
                ] {
                    frames.push((what, frame(to, own, kind, &payload)));
                }
            }
            scene.assert_unseen(frames);
        });
    }
}

#[test]
fn ipv6_is_dropped_and_gives_the_host_no_route() {
    for neighbours in [false, true] {
        in_new_network(move || {
            let mut scene = Scene::new(neighbours, Egress::Full);
            let own = scene.bad.mac.0;
            // A router advertisement that lasts, a redirect, neighbour discovery, an echo, DHCPv6,
            // and an advertisement behind an extension header.
            let messages: [(&str, Vec<u8>); 7] = [
                (
                    "advertisement",
                    ipv6(58, &[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]),
                ),
                ("redirect", ipv6(58, &[137, 0, 0, 0])),
                ("solicitation", ipv6(58, &[135, 0, 0, 0])),
                ("neighbour", ipv6(58, &[136, 0, 0, 0])),
                ("echo", ipv6(58, &[128, 0, 0, 0])),
                ("DHCPv6", ipv6(17, &udp(547, 546))),
                (
                    "hidden advertisement",
                    ipv6(0, &[58, 0, 1, 4, 0, 0, 0, 0, 134, 0, 0, 0]),
                ),
            ];
            let frames = messages.into_iter().flat_map(|(what, packet)| {
                [scene.gateway, ALL_NODES, GROUP, [0xff; 6]]
                    .map(|to| (what, frame(to, own, IPV6, &packet)))
            });
            let frames = frames.collect();
            scene.assert_unseen(frames);
            assert_eq!(run("ip -6 route show default"), "");
        });
    }
}

#[test]
fn the_host_has_no_address_on_a_tap_and_no_ipv6_on_the_bridge() {
    in_new_network(|| {
        let scene = Scene::new(false, Egress::Full);
        for interface in [&scene.bad.attachment.tap_name, BRIDGE] {
            let addresses = run(&format!("ip -6 address show dev {interface}"));
            assert_eq!(addresses, "", "{interface}");
        }
        let tap = &scene.bad.attachment.tap_name;
        assert_eq!(run(&format!("ip -4 address show dev {tap}")), "");
        assert!(run(&format!("ip link show dev {tap}")).contains("NOARP"));
        let port = run(&format!("bridge -d link show dev {tap}"));
        for flag in [
            "learning off",
            "flood off",
            "mcast_flood off",
            "isolated on",
            "guard on",
        ] {
            assert!(port.contains(flag), "{flag}: {port}");
        }
    });
}

#[test]
fn servers_and_routers_are_not_played() {
    for neighbours in [false, true] {
        in_new_network(move || {
            let mut scene = Scene::new(neighbours, Egress::Full);
            let (own, address, host) = (scene.bad.mac.0, scene.bad.address, scene.bad.gateway());
            let friend = scene.friend.address;
            let everybody = Ipv4Addr::BROADCAST;
            let group = Ipv4Addr::new(224, 0, 0, 1);
            let lsrr = [131, 7, 4, 192, 0, 2, 7, 0];
            let packets = vec![
                (
                    "DHCP answer",
                    ipv4(0x45, address, everybody, 17, &[], &udp(67, 68)),
                ),
                (
                    "DHCP answer to one",
                    ipv4(0x45, address, friend, 17, &[], &udp(67, 68)),
                ),
                (
                    "DHCP question",
                    ipv4(
                        0x45,
                        Ipv4Addr::UNSPECIFIED,
                        everybody,
                        17,
                        &[],
                        &udp(68, 67),
                    ),
                ),
                ("redirect", ipv4(0x45, address, host, 1, &[], &[5, 1, 0, 0])),
                (
                    "router advertisement",
                    ipv4(0x45, address, group, 1, &[], &[9, 0, 0, 0]),
                ),
                (
                    "IGMP question",
                    ipv4(0x45, address, group, 2, &[], &[0x11, 0, 0, 0]),
                ),
                (
                    "VRRP",
                    ipv4(
                        0x45,
                        address,
                        Ipv4Addr::new(224, 0, 0, 18),
                        112,
                        &[],
                        &[0x31],
                    ),
                ),
                (
                    "OSPF",
                    ipv4(0x45, address, Ipv4Addr::new(224, 0, 0, 5), 89, &[], &[2, 1]),
                ),
                (
                    "IP in IP",
                    ipv4(
                        0x45,
                        address,
                        host,
                        4,
                        &[],
                        &ipv4(0x45, host, host, 17, &[], &udp(1, 9)),
                    ),
                ),
                (
                    "6in4",
                    ipv4(0x45, address, host, 41, &[], &ipv6(17, &udp(1, 9))),
                ),
                (
                    "a route of its own",
                    ipv4(0x47, address, host, 17, &lsrr, &udp(4000, 9)),
                ),
                (
                    "a header too short",
                    ipv4(0x44, address, host, 17, &[], &udp(4000, 9)),
                ),
                (
                    "version 6 as 4",
                    ipv4(0x65, address, host, 17, &[], &udp(4000, 9)),
                ),
            ];
            let gateway = scene.gateway;
            let friend = scene.friend.mac.0;
            let frames = packets.into_iter().flat_map(|(what, packet)| {
                [gateway, friend, [0xff; 6], [1, 0, 0x5e, 0, 0, 1]]
                    .map(|to| (what, frame(to, own, IPV4, &packet)))
            });
            let frames = frames.collect();
            scene.assert_unseen(frames);
        });
    }
}

#[test]
fn nobody_elses_addresses_are_used() {
    for neighbours in [false, true] {
        in_new_network(move || {
            let mut scene = Scene::new(neighbours, Egress::Full);
            let (own, address, host) = (scene.bad.mac.0, scene.bad.address, scene.bad.gateway());
            let (mac, victim) = (scene.friend.mac.0, scene.friend.address);
            let free = Ipv4Addr::from(u32::from(address) + 99);
            let (gateway, all) = (scene.gateway, [0xff; 6]);
            let datagram = |from| ipv4(0x45, from, host, 17, &[], &udp(4000, 9));
            scene.assert_unseen(vec![
                (
                    "another's station",
                    frame(gateway, mac, IPV4, &datagram(address)),
                ),
                (
                    "the host's station",
                    frame(gateway, gateway, IPV4, &datagram(address)),
                ),
                (
                    "a group's station",
                    frame(gateway, GROUP, IPV4, &datagram(address)),
                ),
                (
                    "another's address",
                    frame(gateway, own, IPV4, &datagram(victim)),
                ),
                (
                    "the host's address",
                    frame(gateway, own, IPV4, &datagram(host)),
                ),
                ("a free address", frame(gateway, own, IPV4, &datagram(free))),
                (
                    "no address",
                    frame(gateway, own, IPV4, &datagram(Ipv4Addr::UNSPECIFIED)),
                ),
                (
                    "loopback",
                    frame(gateway, own, IPV4, &datagram(Ipv4Addr::LOCALHOST)),
                ),
                (
                    "ARP of another",
                    frame(all, own, ARP, &arp(1, own, victim, host)),
                ),
                (
                    "ARP of the host",
                    frame(all, own, ARP, &arp(2, own, host, host)),
                ),
                (
                    "ARP of a free one",
                    frame(all, own, ARP, &arp(1, own, free, free)),
                ),
                (
                    "another's MAC in ARP",
                    frame(all, own, ARP, &arp(1, mac, address, host)),
                ),
                (
                    "a probe for another's",
                    frame(all, own, ARP, &arp(1, own, Ipv4Addr::UNSPECIFIED, victim)),
                ),
                (
                    "an operation of RARP",
                    frame(all, own, ARP, &arp(3, own, address, host)),
                ),
                (
                    "cut short",
                    [&frame(gateway, own, IPV4, &[0x45])[..], b""].concat(),
                ),
            ]);
            // The table of stations is the owner's word, whatever was sent.
            let stations = run("bridge fdb show");
            let friend = format!(
                "{} dev {}",
                scene.friend.mac, scene.friend.attachment.tap_name
            );
            let line = stations
                .lines()
                .find(|line| line.contains(&friend))
                .unwrap();
            assert!(line.contains("static") && line.contains("sticky"), "{line}");
        });
    }
}

#[test]
fn a_guest_without_neighbours_is_heard_by_none() {
    in_new_network(|| {
        let mut scene = Scene::new(false, Egress::Full);
        let (own, address) = (scene.bad.mac.0, scene.bad.address);
        let (mac, friend) = (scene.friend.mac.0, scene.friend.address);
        let everybody = Ipv4Addr::BROADCAST;
        let group = Ipv4Addr::new(224, 0, 0, 251);
        let datagram = |to| ipv4(0x45, address, to, 17, &[], &udp(4000, 9));
        scene.assert_unseen(vec![
            ("to one", frame(mac, own, IPV4, &datagram(friend))),
            ("to all", frame([0xff; 6], own, IPV4, &datagram(everybody))),
            (
                "to a group",
                frame([1, 0, 0x5e, 0, 0, 251], own, IPV4, &datagram(group)),
            ),
            (
                "a question",
                frame([0xff; 6], own, ARP, &arp(1, own, address, friend)),
            ),
            (
                "an answer",
                frame(mac, own, ARP, &arp(2, own, address, friend)),
            ),
            (
                "an answer to all",
                frame([0xff; 6], own, ARP, &arp(2, own, address, friend)),
            ),
        ]);
    });
}
