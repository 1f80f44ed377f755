//! The host's network as VMs get it, in network namespaces of the test's own. Needs root,
//! `/dev/net/tun`, `ip` and `nft`.
#![allow(clippy::unwrap_used)]

mod bridge;
mod frames;
mod rules;
mod wire;
mod world;

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::Duration;

use clone_api::MacAddr;
use clone_api::config::Egress;
use clone_host::host_net::{BRIDGE, Connection, HostNet, HostNetError, Range, Request};
use tempfile::TempDir;

use wire::{Guest, in_new_network, run, try_run};
use world::{UPLINK, WORLD, World};

fn request(vm: &str) -> Request {
    Request {
        vm: vm.to_owned(),
        connection: Connection::Nat,
        mac: None,
        address: None,
        queues: 1,
        neighbours: false,
        // Most tests have the host listen.
        reach_host: true,
        egress: Egress::Full,
        addresses: Vec::new(),
        connections: None,
    }
}

fn host() -> (HostNet, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (HostNet::new(dir.path().join("net")), dir)
}

fn guest(host: &HostNet, vm: &str) -> Guest {
    Guest::new(host.attach(&request(vm)).unwrap())
}

fn links() -> String {
    run("ip -brief link")
}

/// Fails unless nothing of ours is left in this network and this directory.
fn assert_nothing_left(dir: &Path) {
    assert!(!links().contains("clone"), "{}", links());
    assert!(!run("nft list tables").contains("clone"));
    assert!(!run("ip rule").contains("clone"));
    let files: Vec<_> = fs::read_dir(dir.join("net"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != "lock")
        .collect();
    assert!(files.is_empty(), "{files:?}");
}

/// Makes every lease look as if its VM had been started long ago by a process that is gone.
fn age_leases(dir: &Path) {
    for entry in fs::read_dir(dir.join("net")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "lease")
        {
            let text = fs::read(&path).unwrap();
            let mut lease: serde_json::Value = serde_json::from_slice(&text).unwrap();
            lease["creator"]["started"] = 1.into();
            fs::write(&path, lease.to_string()).unwrap();
        }
    }
}

#[test]
fn a_guest_gets_an_address_and_the_host_answers_it() {
    in_new_network(|| {
        let (host, dir) = host();
        let mut guest = guest(&host, "web");
        assert_eq!(guest.attachment.tap_name, "clone-0002");
        let gateway = guest.gateway();
        let gateway_mac = guest.finds(gateway).expect("the host answers");
        let server = UdpSocket::bind((gateway, 9)).unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        guest.datagram(gateway_mac, guest.address, (gateway, 9), b"hello");
        let mut text = [0; 16];
        let (len, from) = server.recv_from(&mut text).unwrap();
        assert_eq!(
            (&text[..len], from.ip()),
            (&b"hello"[..], guest.address.into())
        );
        let argument = guest.attachment.address.as_ref().unwrap();
        assert!(
            argument
                .kernel_argument("web", "eth0")
                .starts_with(&format!(
                    "ip={}::{gateway}:255.255.0.0:web:eth0:off",
                    guest.address
                ))
        );
        drop(guest);
        host.detach("web").unwrap();
        assert_nothing_left(dir.path());
    });
}

#[test]
fn a_guest_of_another_host_keeps_its_hardware_address_though_its_address_is_taken() {
    let (send, receive) = std::sync::mpsc::channel();
    in_new_network(move || {
        let (host, _dir) = host();
        let there = guest(&host, "moves");
        send.send((there.mac, there.address)).unwrap();
    });
    let (mac, address) = receive.recv().unwrap();
    in_new_network(move || {
        let (host, _dir) = host();
        let here = guest(&host, "stays");
        assert_eq!(here.address, address);
        let moved = Request {
            mac: Some(mac),
            address: Some(address),
            ..request("moves")
        };
        let mut moved = Guest::new(host.attach(&moved).unwrap());
        assert_eq!(moved.mac, mac);
        assert_ne!(moved.address, address);
        let gateway = moved.gateway();
        moved.finds(gateway).expect("the host answers");
    });
}

#[test]
fn the_host_forgets_who_had_an_address_before() {
    in_new_network(|| {
        let (host, _dir) = host();
        let mut first = guest(&host, "first");
        let _stays = guest(&host, "stays");
        let gateway = first.gateway();
        first.finds(gateway).expect("the host answers");
        let known = || run(&format!("ip neigh show dev {BRIDGE}"));
        assert!(known().contains(&first.mac.to_string()), "{}", known());
        let address = first.address;
        drop(first);
        host.detach("first").unwrap();
        let next = guest(&host, "next");
        assert_eq!(next.address, address);
        let of_next = run(&format!("ip neigh show {address} dev {BRIDGE}"));
        assert_eq!(of_next.trim(), "");
    });
}

#[test]
fn forwarding_is_turned_on_once_and_said_so() {
    in_new_network(|| {
        let (host, _dir) = host();
        let forwarding = || fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        assert_eq!(host.attach(&request("a")).unwrap().notices.len(), 1);
        assert_eq!(forwarding().trim(), "1");
        assert!(host.attach(&request("b")).unwrap().notices.is_empty());
    });
}

#[test]
fn a_guest_speaks_for_nobody_else() {
    in_new_network(|| {
        let (host, _dir) = host();
        let mut liar = guest(&host, "liar");
        let victim = guest(&host, "victim");
        let gateway = liar.gateway();
        let gateway_mac = liar.finds(gateway).expect("the truth is answered");
        let claims = [
            (liar.mac, victim.address),
            (victim.mac, liar.address),
            (victim.mac, victim.address),
            (MacAddr([2, 0, 0, 0, 0, 9]), liar.address),
            (liar.mac, gateway),
        ];
        for (mac, address) in claims {
            liar.ask(gateway, mac, address);
        }
        assert_eq!(liar.answer_from(gateway), None);
        // Nor by datagrams.
        let server = UdpSocket::bind((gateway, 9)).unwrap();
        server
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        liar.datagram(gateway_mac, victim.address, (gateway, 9), b"lie");
        liar.datagram(gateway_mac, liar.address, (gateway, 9), b"truth");
        let mut text = [0; 16];
        let (len, _) = server.recv_from(&mut text).unwrap();
        assert_eq!(&text[..len], b"truth");
    });
}

#[test]
fn guests_see_each_other_only_if_both_may() {
    in_new_network(|| {
        let (host, _dir) = host();
        let neighbour = |vm: &str| {
            let request = Request {
                neighbours: true,
                ..request(vm)
            };
            Guest::new(host.attach(&request).unwrap())
        };
        let mut asking = guest(&host, "a");
        let mut hearing = guest(&host, "b");
        let mut first = neighbour("c");
        let mut second = neighbour("d");
        first.ask(second.address, first.mac, first.address);
        assert!(second.hears_question_for(second.address));
        first.datagram(second.mac, first.address, (second.address, 9), b"hello");
        assert_eq!(second.hears_datagram().as_deref(), Some(&b"hello"[..]));
        // Only in the protocols that are guarded.
        first.send(second.mac.0, first.mac.0, [0x86, 0xdd], &[0x60; 40]);
        assert_eq!(
            second.expect(|frame| frame[12..14] == [0x86, 0xdd] && frame[6..12] == first.mac.0),
            None
        );
        asking.ask(hearing.address, asking.mac, asking.address);
        assert!(!hearing.hears_question_for(hearing.address));
        first.ask(hearing.address, first.mac, first.address);
        assert!(!hearing.hears_question_for(hearing.address));
        hearing.ask(first.address, hearing.mac, hearing.address);
        assert!(!first.hears_question_for(first.address));
        // The detour by the host is closed too.
        let gateway = asking.gateway();
        let gateway_mac = asking.finds(gateway).unwrap();
        run(&format!(
            "ip neigh replace {} lladdr {} dev {BRIDGE}",
            hearing.address, hearing.mac
        ));
        asking.datagram(gateway_mac, asking.address, (hearing.address, 9), b"detour");
        assert_eq!(hearing.hears_datagram(), None);
    });
}

#[test]
fn the_world_is_reached_under_the_hosts_address_and_reaches_nobody_by_itself() {
    in_new_network(|| {
        let (host, _dir) = host();
        let mut guest = guest(&host, "web");
        let world = World::new();
        let (gateway, address) = (guest.gateway(), guest.address);
        let gateway_mac = guest.finds(gateway).unwrap();
        run(&format!(
            "ip neigh replace {address} lladdr {} dev {BRIDGE}",
            guest.mac
        ));
        guest.datagram(gateway_mac, address, (WORLD, 9), b"hello");
        let (text, from) = world.hears().unwrap();
        assert_eq!((&text[..], from.ip()), (&b"hello"[..], UPLINK.into()));
        world.socket.send_to(b"answer", from).unwrap();
        assert_eq!(guest.hears_datagram().as_deref(), Some(&b"answer"[..]));
        // Not an answer to anything.
        world.socket.send_to(b"intrusion", (address, 4001)).unwrap();
        assert_eq!(guest.hears_datagram(), None);
    });
}

#[test]
fn a_guest_sends_where_it_may_and_nowhere_else() {
    in_new_network(|| {
        let (host, dir) = host();
        run("ip address add 192.0.2.1/32 dev lo");
        let allow = |networks: &[&str]| {
            Egress::Allow(networks.iter().map(|it| it.parse().unwrap()).collect())
        };
        let request = Request {
            egress: allow(&["192.0.2.0/24", "192.0.2.1", "198.51.100.0/24"]),
            ..request("held")
        };
        let mut held = Guest::new(host.attach(&request).unwrap());
        let mut free = guest(&host, "free");
        let gateway = held.gateway();
        let mac = held.finds(gateway).expect("ARP is not held");
        free.finds(gateway).unwrap();
        let server = UdpSocket::bind(("0.0.0.0", 9)).unwrap();
        let limit = Some(Duration::from_millis(300));
        server.set_read_timeout(limit).unwrap();
        let elsewhere = Ipv4Addr::new(192, 0, 2, 1);
        // What arrives of what a guest sends to two addresses of the host.
        let heard = |guest: &mut Guest| {
            let from = guest.address;
            guest.datagram(mac, from, (gateway, 9), b"gateway");
            guest.datagram(mac, from, (elsewhere, 9), b"elsewhere");
            let mut heard = Vec::new();
            let mut text = [0; 16];
            while let Ok((len, _)) = server.recv_from(&mut text) {
                heard.push(String::from_utf8(text[..len].to_vec()).unwrap());
            }
            heard
        };
        assert_eq!(heard(&mut held), ["elsewhere"]);
        assert_eq!(heard(&mut free), ["gateway", "elsewhere"]);
        host.restrict("held", &Egress::None, true).unwrap();
        assert_eq!(heard(&mut held), [""; 0]);
        assert_eq!(heard(&mut free), ["gateway", "elsewhere"]);
        // No table of the packet filter holds it.
        run("nft flush ruleset");
        let third = guest(&host, "third");
        assert_eq!(heard(&mut held), [""; 0]);
        host.restrict(
            "held",
            &allow(&["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]),
            true,
        )
        .unwrap();
        assert_eq!(heard(&mut held), ["gateway"]);
        host.restrict("held", &Egress::Full, true).unwrap();
        assert_eq!(heard(&mut held), ["gateway", "elsewhere"]);
        host.restrict("held", &allow(&["192.0.2.1"]), true).unwrap();
        // Who comes later under its tap's name is not held.
        let name = held.attachment.tap_name.clone();
        drop(held);
        host.detach("held").unwrap();
        let mut fourth = guest(&host, "fourth");
        assert_eq!(fourth.attachment.tap_name, name);
        assert_eq!(heard(&mut fourth), ["gateway", "elsewhere"]);
        drop((free, third, fourth));
        for vm in ["free", "third", "fourth"] {
            host.detach(vm).unwrap();
        }
        assert_nothing_left(dir.path());
        host.restrict("held", &Egress::None, true).unwrap();
    });
}

#[test]
fn what_others_set_up_stays_as_it_is() {
    in_new_network(|| {
        run("nft add table inet theirs");
        run("nft add table bridge theirs");
        run("ip link add theirs type bridge");
        run("ip address add 10.213.7.1/24 dev theirs");
        let before = (run("nft list ruleset"), links());
        let (host, dir) = host();
        let guest = guest(&host, "web");
        assert!(
            !guest.address.to_string().starts_with("10.213."),
            "that range was taken"
        );
        drop(guest);
        host.detach("web").unwrap();
        assert_nothing_left(dir.path());
        assert_eq!((run("nft list ruleset"), links()), before);
    });
}

#[test]
fn only_the_last_guest_takes_the_bridge_along() {
    in_new_network(|| {
        let (host, dir) = host();
        let first = guest(&host, "first");
        let mut second = guest(&host, "second");
        drop(first);
        host.detach("first").unwrap();
        let gateway = second.gateway();
        assert!(second.finds(gateway).is_some());
        // By its own name, and while its process still has the tap.
        host.detach("second").unwrap();
        assert_nothing_left(dir.path());
    });
}

#[test]
fn what_killed_vms_left_is_swept_and_the_living_are_spared() {
    in_new_network(|| {
        let (host, dir) = host();
        let killed = guest(&host, "killed");
        let mut living = guest(&host, "living");
        drop(killed);
        // Programs that other tests start may hold copies of its descriptors for a moment.
        let gone = (0..100).any(|_| {
            thread::sleep(Duration::from_millis(10));
            !links().contains("clone-0002")
        });
        assert!(gone, "a tap goes with its process");
        assert!(
            host.sweep(|vm| vm == "living").unwrap().is_empty(),
            "a VM that may be starting is left alone"
        );
        age_leases(dir.path());
        assert_eq!(host.sweep(|vm| vm == "living").unwrap(), ["killed"]);
        let gateway = living.gateway();
        assert!(living.finds(gateway).is_some());
        drop(living);
        assert_eq!(host.sweep(|_| false).unwrap(), ["living"]);
        assert_nothing_left(dir.path());
        assert!(host.sweep(|_| false).unwrap().is_empty());
    });
}

#[test]
fn damaged_records_are_swept_with_what_they_spoke_of() {
    in_new_network(|| {
        let (host, dir) = host();
        let damaged = guest(&host, "damaged");
        let mut living = guest(&host, "living");
        fs::write(dir.path().join("net/0002.lease"), "nonsense").unwrap();
        host.sweep(|_| true).unwrap();
        assert!(!links().contains("clone-0002"));
        let gateway = living.gateway();
        assert!(living.finds(gateway).is_some());
        drop((damaged, living));
        fs::write(dir.path().join("net/nat"), "nonsense").unwrap();
        host.detach("living").unwrap();
        assert_nothing_left(dir.path());
    });
}

#[test]
fn guests_that_come_at_once_get_different_addresses() {
    in_new_network(|| {
        let (host, dir) = host();
        let host = &host;
        let mut addresses: Vec<_> = thread::scope(|scope| {
            let attaching: Vec<_> = (0..8)
                .map(|number| scope.spawn(move || guest(host, &format!("vm{number}")).address))
                .collect();
            attaching
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 8);
        age_leases(dir.path());
        assert_eq!(host.sweep(|_| false).unwrap().len(), 8);
        assert_nothing_left(dir.path());
    });
}

#[test]
fn a_failed_attachment_leaves_nothing() {
    in_new_network(|| {
        let (host, dir) = host();
        // More queues than a tap can have: the last step but one fails.
        let too_many = Request {
            queues: 300,
            ..request("greedy")
        };
        let error = host.attach(&too_many).unwrap_err();
        assert!(matches!(error, HostNetError::Tap(_)), "{error}");
        assert_nothing_left(dir.path());

        let multicast = Request {
            mac: Some(MacAddr([1, 0, 0, 0, 0, 0])),
            ..request("odd")
        };
        host.attach(&multicast).unwrap_err();
        let nowhere = Request {
            connection: Connection::Bridge("nowhere".to_owned()),
            ..request("lost")
        };
        let error = host.attach(&nowhere).unwrap_err();
        assert!(matches!(error, HostNetError::NoSuchLink(_)), "{error}");
        assert_nothing_left(dir.path());
    });
}

#[test]
fn a_small_range_is_used_up_and_then_refused() {
    in_new_network(|| {
        let (host, _dir) = host();
        let host = host.with_range(Range::new(Ipv4Addr::new(10, 9, 0, 0), 28).unwrap());
        let guests: Vec<_> = (0..13)
            .map(|number| guest(&host, &format!("vm{number}")))
            .collect();
        assert_eq!(guests[12].address, Ipv4Addr::new(10, 9, 0, 14));
        let error = host.attach(&request("late")).unwrap_err();
        assert!(matches!(error, HostNetError::NoFreeAddress), "{error}");
        host.detach("vm5").unwrap();
        assert_eq!(guest(&host, "late").address, Ipv4Addr::new(10, 9, 0, 7));
    });
}

#[test]
fn a_bridge_of_our_name_that_is_not_ours_is_left_alone() {
    in_new_network(|| {
        run(&format!("ip link add {BRIDGE} type bridge"));
        let (host, _dir) = host();
        let error = host.attach(&request("web")).unwrap_err();
        assert!(matches!(error, HostNetError::Foreign(_)), "{error}");
        host.sweep(|_| false).unwrap();
        assert!(links().contains(BRIDGE));
    });
}

#[test]
fn a_tap_of_the_owners_is_taken_as_it_is_and_never_made() {
    in_new_network(|| {
        let (host, _dir) = host();
        let request = Request {
            connection: Connection::Tap("mine".to_owned()),
            queues: 2,
            ..request("web")
        };
        let error = host.attach(&request).unwrap_err();
        assert!(matches!(error, HostNetError::NoSuchLink(_)), "{error}");
        assert!(!links().contains("mine"));
        run("ip tuntap add mine mode tap multi_queue");
        assert_eq!(host.attach(&request).unwrap().taps.len(), 2);
        let single = Request {
            queues: 1,
            ..request
        };
        assert_eq!(host.attach(&single).unwrap().taps.len(), 1);
        assert!(links().contains("mine"));
        try_run("nft list table inet clone").unwrap_err();
    });
}
