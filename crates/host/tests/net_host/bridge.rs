//! Guests on a bridge that the owner made.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};

use clone_api::MacAddr;
use clone_host::host_net::{Connection, HostNet, HostNetError, Request};

use crate::wire::{Guest, in_new_network, run};
use crate::{assert_nothing_left, host, links, request};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 50);
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 51);

fn make_bridge() {
    run("ip link add br0 type bridge");
    run("ip address add 192.0.2.1/24 dev br0");
    run("ip link set br0 mtu 1400 up");
    run("ip route add default via 192.0.2.254");
}

fn on_bridge(vm: &str) -> Request {
    Request {
        connection: Connection::Bridge("br0".to_owned()),
        ..request(vm)
    }
}

fn station(host: &HostNet, request: &Request) -> Guest {
    Guest::new(host.attach(request).unwrap())
}

#[test]
fn a_guest_joins_a_bridge_of_the_owners() {
    in_new_network(|| {
        make_bridge();
        let (host, dir) = host();
        let mut guest = station(&host, &on_bridge("web"));
        assert_eq!(
            (guest.attachment.mtu, &guest.attachment.address),
            (Some(1400), &None)
        );
        // Any address but those that are known to be others', and its own station only.
        assert!(guest.finds_as(OWN, GATEWAY).is_some());
        guest.ask(GATEWAY, MacAddr([2, 0, 0, 0, 0, 9]), OTHER);
        assert!(guest.answer_from(GATEWAY).is_none());
        for reserved in [GATEWAY, Ipv4Addr::new(192, 0, 2, 254)] {
            guest.ask(GATEWAY, guest.mac, reserved);
            assert!(guest.answer_from(GATEWAY).is_none(), "{reserved}");
        }
        let notices = guest.attachment.notices.concat();
        assert!(notices.contains("address=ADDRESS"), "{notices}");
        drop(guest);
        host.detach("web").unwrap();
        assert_nothing_left(dir.path());
        assert!(links().contains("br0"));
    });
}

#[test]
fn a_guest_with_given_addresses_has_no_others() {
    in_new_network(|| {
        make_bridge();
        let (host, _dir) = host();
        let request = Request {
            addresses: vec![IpAddr::V4(OWN)],
            ..on_bridge("web")
        };
        let mut guest = station(&host, &request);
        assert!(guest.attachment.notices.is_empty());
        let mac = guest.finds_as(OWN, GATEWAY).unwrap();
        guest.ask(GATEWAY, guest.mac, OTHER);
        assert!(guest.answer_from(GATEWAY).is_none());
        let server = std::net::UdpSocket::bind((GATEWAY, 9)).unwrap();
        guest.datagram(mac, OTHER, (GATEWAY, 9), b"lie");
        guest.datagram(mac, OWN, (GATEWAY, 9), b"truth");
        let mut text = [0; 16];
        let (len, _) = server.recv_from(&mut text).unwrap();
        assert_eq!(&text[..len], b"truth");
    });
}

#[test]
fn a_station_cannot_be_taken_over() {
    in_new_network(|| {
        make_bridge();
        let (host, _dir) = host();
        let victim = station(&host, &on_bridge("victim"));
        let mut thief = station(&host, &on_bridge("thief"));
        thief.finds_as(OWN, GATEWAY).unwrap();
        for to in [[0xff; 6], [0x01, 0x80, 0xc2, 0, 0, 0], [2, 2, 2, 2, 2, 2]] {
            thief.send(to, victim.mac.0, [0x08, 0], &[0x45; 40]);
        }
        thief.finds_as(OWN, GATEWAY).unwrap();
        let table = run("bridge fdb show br br0");
        let of_victim: Vec<_> = table
            .lines()
            .filter(|line| line.starts_with(&victim.mac.to_string()))
            .collect();
        assert_eq!(of_victim.len(), 1, "{table}");
        assert!(of_victim[0].contains(&victim.attachment.tap_name));
        // Not even by the owner's word.
        let same = Request {
            mac: Some(victim.mac),
            ..on_bridge("same")
        };
        let error = host.attach(&same).unwrap_err();
        assert!(matches!(error, HostNetError::MacInUse(_)), "{error}");
    });
}

#[test]
fn a_guest_that_the_bridge_has_seen_on_another_host_is_taken() {
    in_new_network(|| {
        make_bridge();
        run("ip link add cable type veth peer name far");
        run("ip link set cable master br0 up");
        run("ip link set far up");
        run("bridge link set dev cable state 3");
        run("bridge fdb add 02:00:5e:00:00:07 dev cable master dynamic");
        let (host, _dir) = host();
        let comes = Request {
            mac: Some(MacAddr([2, 0, 0x5e, 0, 0, 7])),
            ..on_bridge("comes")
        };
        let comes = station(&host, &comes);
        let table = run("bridge fdb show br br0");
        let mut of_it = table
            .lines()
            .filter(|it| it.starts_with("02:00:5e:00:00:07"));
        let entry = of_it.next().unwrap();
        assert!(entry.contains(&comes.attachment.tap_name), "{table}");
        assert_eq!(of_it.next(), None, "{table}");
    });
}

#[test]
fn guests_on_a_bridge_hear_each_other_only_if_both_may() {
    in_new_network(|| {
        make_bridge();
        let (host, _dir) = host();
        let with = |vm: &str, neighbours| {
            let request = Request {
                neighbours,
                ..on_bridge(vm)
            };
            station(&host, &request)
        };
        let mut guests = [
            with("a", false),
            with("b", true),
            with("c", false),
            with("d", true),
        ];
        guests[0].finds_as(OWN, GATEWAY).unwrap();
        for from in 0..4 {
            for to in 0..4 {
                if from == to {
                    continue;
                }
                let (mac, whom) = (guests[from].mac, Ipv4Addr::new(192, 0, 2, 77));
                guests[to].drain();
                guests[from].ask(whom, mac, OWN);
                let heard = guests[to].hears_question_for(whom);
                assert_eq!(heard, from % 2 == 1 && to % 2 == 1, "{from} to {to}");
            }
        }
    });
}

#[test]
fn guests_of_an_older_version_are_guarded_anew() {
    in_new_network(|| {
        make_bridge();
        let (host, dir) = host();
        let mut old = station(&host, &on_bridge("old"));
        let mut behind_nat = station(&host, &request("nat"));
        old.finds_as(OWN, GATEWAY).unwrap();
        // What a version before had: a lease without a bridge, and a table that guards all taps.
        let path = dir.path().join("net/0002.lease");
        let text = fs::read(&path).unwrap();
        let mut lease: serde_json::Value = serde_json::from_slice(&text).unwrap();
        lease.as_object_mut().unwrap().remove("bridge");
        fs::write(&path, lease.to_string()).unwrap();
        run(&format!(
            "tc qdisc del dev {} clsact",
            old.attachment.tap_name
        ));
        run("nft add table bridge clone");
        run(
            "nft add chain bridge clone guard { type filter hook prerouting priority -300; policy drop; }",
        );
        let mut new = station(&host, &on_bridge("new"));
        assert!(new.finds_as(OTHER, GATEWAY).is_some());
        assert!(old.finds_as(OWN, GATEWAY).is_some());
        old.ask(GATEWAY, new.mac, OWN);
        assert!(old.answer_from(GATEWAY).is_none(), "it is guarded");
        // So are guests behind NAT, as before.
        let gateway = behind_nat.gateway();
        assert!(behind_nat.finds(gateway).is_some());
        behind_nat.ask(gateway, behind_nat.mac, OTHER);
        assert!(behind_nat.answer_from(gateway).is_none());
        drop((old, new, behind_nat));
        host.detach("nat").unwrap();
        host.detach("old").unwrap();
        host.detach("new").unwrap();
        assert_nothing_left(dir.path());
    });
}
