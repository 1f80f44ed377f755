//! Runs the programs in an interpreter. Guest tests run them in the kernel, on real taps.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::*;

const OWN: MacAddr = MacAddr([2, 0, 0, 0, 0, 7]);
const OTHER: MacAddr = MacAddr([2, 0, 0, 0, 0, 8]);
const ALL: MacAddr = MacAddr([0xff; 6]);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

fn bridge<'a>(addresses: &'a [IpAddr], egress: &'a Egress) -> Guard<'a> {
    Guard {
        mac: OWN,
        place: Place::Bridge {
            addresses,
            reserved: vec![ROUTER],
            strangers: vec![OTHER],
        },
        neighbours: false,
        egress,
    }
}

fn anywhere() -> Guard<'static> {
    bridge(&[], &Egress::Full)
}

fn frame(to: MacAddr, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &OWN.0, &(kind as u16).to_be_bytes(), payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

fn sends(guard: &Guard<'_>, frame: &[u8]) -> bool {
    guard.judge_sent().passes(frame, false, 0)
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, rest: &[u8]) -> Vec<u8> {
    let header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
    [&header[..], &from.octets(), &to.octets(), rest].concat()
}

fn ports(from: u16, to: u16) -> Vec<u8> {
    [from.to_be_bytes(), to.to_be_bytes(), [0; 2], [0; 2]].concat()
}

fn ipv6(from: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u16).to_be_bytes();
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    [
        &[0x60, 0, 0, 0][..],
        &len,
        &[next, 255],
        &from.octets(),
        &to.octets(),
        payload,
    ]
    .concat()
}

const IPV6_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const IPV6_GROUP: MacAddr = MacAddr([0x33, 0x33, 0, 0, 0, 1]);

/// A message of neighbour discovery for `target`, with an option that names `mac`.
fn discovery(kind: u8, target: Ipv6Addr, option: u8, mac: MacAddr) -> Vec<u8> {
    [
        &[kind, 0, 0, 0, 0, 0, 0, 0][..],
        &target.octets(),
        &[option, 1],
        &mac.0,
    ]
    .concat()
}

#[test]
fn what_a_station_of_a_bridge_needs_passes() {
    let guard = anywhere();
    let mdns = Ipv4Addr::new(224, 0, 0, 251);
    let report = [0x22, 0, 0, 0];
    let mut igmp = ipv4(ADDRESS, mdns, 2, &[&[0x94, 4, 0, 0][..], &report].concat());
    igmp[0] = 0x46;
    let mld = [&[58, 0, 5, 2, 0, 0, 1, 0][..], &[143, 0, 0, 0]].concat();
    let v4 = [
        (OTHER, ipv4(ADDRESS, ROUTER, 6, &ports(4000, 80))),
        (ALL, ipv4(ADDRESS, Ipv4Addr::BROADCAST, 17, &ports(4000, 9))),
        (
            MacAddr([1, 0, 0x5e, 0, 0, 251]),
            ipv4(ADDRESS, mdns, 17, &ports(5353, 5353)),
        ),
        (MacAddr([1, 0, 0x5e, 0, 0, 251]), igmp),
        (
            ALL,
            ipv4(
                Ipv4Addr::UNSPECIFIED,
                Ipv4Addr::BROADCAST,
                17,
                &ports(68, 67),
            ),
        ),
        (OTHER, ipv4(ADDRESS, ROUTER, 1, &[8, 0, 0, 0])),
    ];
    for (to, packet) in v4 {
        assert!(sends(&guard, &frame(to, IPV4, &packet)), "{packet:x?}");
    }
    let v6 = [
        ipv6(IPV6_ADDRESS, 6, &ports(4000, 80)),
        ipv6(IPV6_ADDRESS, 58, &[128, 0, 0, 0, 0, 0, 0, 0]),
        ipv6(IPV6_ADDRESS, 58, &discovery(135, IPV6_ADDRESS, 1, OWN)),
        ipv6(IPV6_ADDRESS, 58, &discovery(136, IPV6_ADDRESS, 2, OWN)),
        ipv6(
            Ipv6Addr::UNSPECIFIED,
            58,
            &discovery(135, IPV6_ADDRESS, 14, OTHER),
        ),
        ipv6(Ipv6Addr::UNSPECIFIED, 0, &mld),
        ipv6(IPV6_ADDRESS, 58, &[133, 0, 0, 0, 0, 0, 0, 0]),
        ipv6(IPV6_ADDRESS, 17, &ports(546, 547)),
    ];
    for packet in &v6 {
        assert!(
            sends(&guard, &frame(IPV6_GROUP, IPV6, packet)),
            "{packet:x?}"
        );
        // Who knows its addresses has no others, and a limit of destinations knows IPv4 only.
        let own = [IpAddr::V6(IPV6_ADDRESS)];
        assert!(sends(
            &bridge(&own, &Egress::Full),
            &frame(IPV6_GROUP, IPV6, packet)
        ));
        let other = [IpAddr::V6(Ipv6Addr::LOCALHOST)];
        let is_nameless = packet[8..24] == [0; 16];
        let passes = sends(
            &bridge(&other, &Egress::Full),
            &frame(IPV6_GROUP, IPV6, packet),
        );
        assert_eq!(passes, is_nameless);
        let only_v4 = [IpAddr::V4(ADDRESS)];
        assert!(!sends(
            &bridge(&only_v4, &Egress::Full),
            &frame(IPV6_GROUP, IPV6, packet)
        ));
        assert!(!sends(
            &bridge(&[], &Egress::None),
            &frame(IPV6_GROUP, IPV6, packet)
        ));
    }
}

#[test]
fn what_only_routers_and_servers_send_is_dropped_on_a_bridge() {
    let guard = anywhere();
    let unspecified = Ipv4Addr::UNSPECIFIED;
    let mut routed = ipv4(ADDRESS, ROUTER, 17, &ports(4000, 9));
    routed[0] = 0x46;
    let v4 = [
        ipv4(ADDRESS, Ipv4Addr::BROADCAST, 17, &ports(67, 68)),
        ipv4(unspecified, Ipv4Addr::BROADCAST, 17, &ports(4000, 67)),
        ipv4(unspecified, Ipv4Addr::BROADCAST, 6, &ports(68, 67)),
        ipv4(ROUTER, ADDRESS, 17, &ports(4000, 9)),
        ipv4(Ipv4Addr::new(224, 0, 0, 1), ADDRESS, 17, &ports(4000, 9)),
        ipv4(ADDRESS, ROUTER, 1, &[5, 0, 0, 0]),
        ipv4(ADDRESS, ROUTER, 2, &[0x11, 0, 0, 0]),
        ipv4(ADDRESS, ROUTER, 112, &[0x21]),
        routed,
    ];
    for packet in v4 {
        for to in [OTHER, ALL] {
            assert!(!sends(&guard, &frame(to, IPV4, &packet)), "{packet:x?}");
        }
    }
    let advertisement = [134, 0, 0, 0, 0, 0, 0, 0];
    let behind = |header: u8| [&[58, 0, 0, 0, 0, 0, 0, 0][..], &advertisement, &[header]].concat();
    let v6 = [
        ipv6(IPV6_ADDRESS, 58, &advertisement),
        ipv6(IPV6_ADDRESS, 58, &[137, 0, 0, 0]),
        ipv6(IPV6_ADDRESS, 17, &ports(547, 546)),
        ipv6(IPV6_ADDRESS, 0, &behind(0)),
        ipv6(IPV6_ADDRESS, 43, &behind(43)),
        ipv6(IPV6_ADDRESS, 44, &behind(44)),
        ipv6(IPV6_ADDRESS, 60, &behind(60)),
        ipv6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 17, &ports(1, 2)),
        ipv6(Ipv6Addr::UNSPECIFIED, 17, &ports(1, 2)),
        ipv6(IPV6_ADDRESS, 58, &discovery(135, IPV6_ADDRESS, 1, OTHER)),
        ipv6(IPV6_ADDRESS, 58, &discovery(136, IPV6_ADDRESS, 2, OTHER)),
        ipv6(
            IPV6_ADDRESS,
            58,
            &[discovery(136, IPV6_ADDRESS, 2, OWN), vec![2, 1]].concat(),
        ),
    ];
    for packet in v6 {
        assert!(
            !sends(&guard, &frame(IPV6_GROUP, IPV6, &packet)),
            "{packet:x?}"
        );
    }
}

#[test]
fn fragments_pass_but_not_as_a_disguise() {
    let guard = anywhere();
    let fragment = |offset_and_more: u16, from: u16| {
        let mut packet = ipv4(ADDRESS, ROUTER, 17, &ports(from, 68));
        packet[6..8].copy_from_slice(&offset_and_more.to_be_bytes());
        frame(OTHER, IPV4, &packet)
    };
    assert!(sends(&guard, &fragment(0x2000, 4000)));
    assert!(!sends(&guard, &fragment(0x2000, 67)));
    // What looks like a port in a later one is data.
    assert!(sends(&guard, &fragment(0x2001, 67)));
    assert!(sends(&guard, &fragment(1, 67)));
}

#[test]
fn a_limit_of_destinations_holds_to_the_bit() {
    let allow = Egress::Allow(vec![
        "10.0.0.0/8".parse().unwrap(),
        "198.51.100.64/26".parse().unwrap(),
        "203.0.113.9".parse().unwrap(),
    ]);
    let guard = bridge(&[], &allow);
    let passes = |to: [u8; 4]| {
        let packet = ipv4(ADDRESS, to.into(), 6, &ports(4000, 80));
        sends(&guard, &frame(OTHER, IPV4, &packet))
    };
    for to in [
        [10, 0, 0, 0],
        [10, 255, 255, 255],
        [198, 51, 100, 127],
        [203, 0, 113, 9],
    ] {
        assert!(passes(to), "{to:?}");
    }
    for to in [
        [11, 0, 0, 0],
        [9, 255, 255, 255],
        [198, 51, 100, 63],
        [198, 51, 100, 128],
        [203, 0, 113, 8],
    ] {
        assert!(!passes(to), "{to:?}");
    }
    let everything = Egress::Allow(vec!["0.0.0.0/0".parse().unwrap()]);
    let packet = ipv4(ADDRESS, ROUTER, 6, &ports(4000, 80));
    assert!(sends(
        &bridge(&[], &everything),
        &frame(OTHER, IPV4, &packet)
    ));
}

#[test]
fn a_frame_cut_short_anywhere_is_dropped() {
    let guard = anywhere();
    let packet = ipv4(ADDRESS, ROUTER, 17, &ports(4000, 9));
    let whole = [&OTHER.0[..], &OWN.0, &[8, 0], &packet].concat();
    assert!(sends(&guard, &whole));
    for len in 0..36 {
        assert!(!sends(&guard, &whole[..len]), "{len}");
    }
    assert!(!guard.judge_sent().passes(&whole, true, 0), "tagged");
}

#[test]
fn only_strangers_are_not_heard_on_a_bridge() {
    let received = anywhere().judge_received();
    let from = |mac: MacAddr| [&OWN.0[..], &mac.0, &[8, 0], &[0; 46]].concat();
    assert!(received.passes(&from(MacAddr([2, 0, 0, 0, 0, 9])), false, 0));
    assert!(!received.passes(&from(OTHER), false, 0));
}

#[test]
fn link_local_addresses_are_closed_behind_nat_unless_a_policy_names_them() {
    let range = Range::new(Ipv4Addr::new(10, 0, 0, 0), 24).unwrap();
    let address = Ipv4Addr::new(10, 0, 0, 7);
    let sends_to = |egress: &Egress, to: [u8; 4]| {
        let guard = Guard {
            mac: OWN,
            place: Place::Nat { address, range },
            neighbours: false,
            egress,
        };
        let gateway = range.gateway_mac();
        let packet = ipv4(address, Ipv4Addr::from(to), 6, &ports(40_000, 80));
        sends(&guard, &frame(gateway, IPV4, &packet))
    };
    let allow =
        |networks: &[&str]| Egress::Allow(networks.iter().map(|it| it.parse().unwrap()).collect());
    let metadata = [169, 254, 169, 254];
    let everything = allow(&["0.0.0.0/0"]);
    for egress in [&Egress::Full, &everything] {
        assert!(sends_to(egress, [198, 51, 100, 1]));
        assert!(!sends_to(egress, metadata), "{egress:?}");
        assert!(!sends_to(egress, [169, 254, 0, 1]), "{egress:?}");
        assert!(sends_to(egress, [169, 253, 0, 1]));
    }
    let named = allow(&["0.0.0.0/0", "169.254.169.254/32"]);
    assert!(sends_to(&named, metadata));
    assert!(!sends_to(&named, [169, 254, 0, 1]));
    assert!(sends_to(&named, [198, 51, 100, 1]));
}

#[test]
fn the_longest_program_is_one_that_the_kernel_takes() {
    let networks = (0..Egress::MAX_NETWORKS as u32).map(|it| format!("10.{it}.0.0/16"));
    let egress = Egress::Allow(networks.map(|it| it.parse().unwrap()).collect());
    let addresses: Vec<_> = (0..16)
        .map(|it| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, it)))
        .collect();
    for (addresses, egress) in [(&addresses[..], &Egress::Full), (&[], &egress)] {
        let guard = bridge(addresses, egress);
        assert!(guard.ingress().count < 4096);
    }
}
