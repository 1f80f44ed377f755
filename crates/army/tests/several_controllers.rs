//! Several controllers on one PostgreSQL, with simulated hosts: how they share them, and what is left
//! of one that is killed.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod fleet;
mod served;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use army_api::hosts::HostState;
use army_api::vms::VmState;
use army_controller::{Cluster, Controller, ErrorKind};
use army_node_api::cluster::Member;
use army_node_api::cluster::authority::Authority;
use army_node_api::cluster::tls::{self, Identity};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use fleet::{Running, alive, create, hosts, requester, shares, template, wait};
use served::Postgres;

#[tokio::test(flavor = "multi_thread")]
async fn three_controllers_share_a_fleet_and_one_that_is_killed_under_load_loses_nothing() {
    const HOSTS: usize = 12;
    let postgres = Postgres::start();
    let nodes = hosts(HOSTS);
    let mut controllers = Vec::new();
    for _ in 0..3 {
        controllers.push(Arc::new(Running::start(&postgres, &nodes).await));
    }
    template(&controllers[0].records, &nodes).await;
    let all: Vec<&Running> = controllers.iter().map(|it| &**it).collect();
    wait(
        "the hosts are shared out",
        Duration::from_secs(20),
        async || shares(&all, HOSTS).await == Some(vec![4, 4, 4]),
    )
    .await;
    for controller in &controllers {
        wait("every host is ready", Duration::from_secs(20), async || {
            let hosts = controller.controller.hosts().await.unwrap();
            hosts.iter().all(|it| it.state == HostState::Ready)
        })
        .await;
    }

    // Clients create VMs at all controllers, and destroy every other one.
    let stop = Arc::new(AtomicBool::new(false));
    let (kept, destroyed) = (
        Arc::new(Mutex::new(BTreeSet::new())),
        Arc::new(Mutex::new(BTreeSet::new())),
    );
    let mut clients = Vec::new();
    for client in 0..9 {
        let (running, stop) = (Arc::clone(&controllers[client % 3]), Arc::clone(&stop));
        let (kept, destroyed) = (Arc::clone(&kept), Arc::clone(&destroyed));
        clients.push(tokio::spawn(async move {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let Ok(vm) = create(&running.controller).await else {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                };
                count += 1;
                kept.lock().unwrap().insert(vm.id.clone());
                if count % 2 == 0 && running.controller.destroy(&vm).await.is_ok() {
                    kept.lock().unwrap().remove(&vm.id);
                    destroyed.lock().unwrap().insert(vm.id);
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    controllers[0].kill();
    for (index, client) in clients.iter().enumerate() {
        if index % 3 == 0 {
            client.abort();
        }
    }
    let rest = [&*controllers[1], &*controllers[2]];
    let took = wait(
        "the hosts of the dead move",
        Duration::from_secs(10),
        async || shares(&rest, HOSTS).await.is_some(),
    )
    .await;
    println!("the hosts of a dead controller have moved after {took:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let _ = client.await;
    }
    let confirmed = kept.lock().unwrap().clone();
    assert!(confirmed.len() > 50, "there was hardly any load");

    // The hosts and the database agree in the end.
    let records = &controllers[1].records;
    wait("all is settled", Duration::from_secs(60), async || {
        let known = alive(records).await;
        let settled = known.values().all(|vm| vm.state == VmState::Running);
        let running: BTreeSet<String> = nodes.iter().flat_map(|it| it.running_vms()).collect();
        settled && running == known.keys().cloned().collect()
    })
    .await;
    let known = alive(records).await;
    for id in &confirmed {
        // A client that was killed with its controller may have been about to destroy its VM.
        let is_there = known.contains_key(id);
        let record = records.vm(id).await.unwrap();
        assert!(
            is_there || record.reason.as_deref() == Some("destroyed"),
            "{record:?}"
        );
    }
    for id in &*destroyed.lock().unwrap() {
        assert!(!known.contains_key(id), "{id} is there again");
    }
    for node in &nodes {
        assert_eq!(node.created_twice(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_was_replaced_changes_nothing_on_a_host_and_ends() {
    let postgres = Postgres::start();
    let nodes = hosts(1);
    let first = Running::start(&postgres, &nodes).await;
    template(&first.records, &nodes).await;
    wait("the host is ready", Duration::from_secs(20), async || {
        let hosts = first.controller.hosts().await.unwrap();
        hosts.iter().all(|it| it.state == HostState::Ready)
    })
    .await;
    let vm = create(&first.controller).await.unwrap();
    // It is stopped for so long that its lease runs out, and another one takes over.
    first.kill();
    first.records.expire_lease().await.unwrap();
    let second = Running::start(&postgres, &nodes).await;
    wait("the host has moved", Duration::from_secs(10), async || {
        shares(&[&second], 1).await.is_some() && nodes[0].reports_made() > 1
    })
    .await;
    wait(
        "the new owner has reports",
        Duration::from_secs(10),
        async || {
            let hosts = second.controller.hosts().await.unwrap();
            hosts.iter().all(|it| it.state == HostState::Ready)
        },
    )
    .await;
    // The first one knows of the host what the second one writes down.
    wait(
        "the host was measured",
        Duration::from_secs(10),
        async || {
            let hosts = first.controller.hosts().await.unwrap();
            hosts
                .iter()
                .all(|it| it.capacity.unwrap().available_bytes > 0)
        },
    )
    .await;
    let requested = nodes[0].requested_vms();
    let error = create(&first.controller).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Superseded, "{error}");
    let error = first.controller.pause(&vm).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Superseded, "{error}");
    assert_eq!(nodes[0].requested_vms(), requested);
    // Its process ends: both of its loops do.
    let ended = Arc::clone(&first.controller).hold_term().await;
    assert_eq!(ended.kind, ErrorKind::Superseded);
    let ended = Arc::clone(&first.controller).reconcile().await;
    assert_eq!(ended.kind, ErrorKind::Superseded);
    create(&second.controller).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_at_one_controller_reaches_readers_at_another() {
    let postgres = Postgres::start();
    let nodes = hosts(2);
    let first = Running::start(&postgres, &nodes).await;
    let second = Running::start(&postgres, &nodes).await;
    let mut events = second.controller.events(None, None).await.unwrap();
    first
        .controller
        .set_draining(&requester(), "host-01", true)
        .await
        .unwrap();
    let read = async {
        loop {
            let event = events.next().await.unwrap();
            if event.kind == "host.draining" {
                return event;
            }
        }
    };
    let event = tokio::time::timeout(Duration::from_secs(20), read).await;
    assert_eq!(event.unwrap().subject, "host-01");
    wait(
        "the other controller knows",
        Duration::from_secs(10),
        async || {
            let hosts = second.controller.hosts().await.unwrap();
            hosts.iter().any(|it| it.state == HostState::Draining)
        },
    )
    .await;
    first.kill();
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_with_another_authority_is_refused() {
    let postgres = Postgres::start();
    let cluster = |folder: &std::path::Path| {
        let authority = Authority::open(folder).unwrap();
        let credentials = authority.credentials(&Member::Controller).unwrap();
        let pem = authority.certificate().as_bytes();
        Cluster {
            tls: Identity::new(&credentials).unwrap().client().unwrap(),
            fingerprint: tls::fingerprint(&CertificateDer::from_pem_slice(pem).unwrap()),
        }
    };
    let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let controller =
        async |folder| Controller::of_cluster(postgres.open().await, cluster(folder)).await;
    controller(own.path()).await.unwrap();
    // What an operator copies.
    let copy = tempfile::tempdir().unwrap();
    for file in ["authority.key", "authority.pem"] {
        std::fs::copy(own.path().join(file), copy.path().join(file)).unwrap();
    }
    controller(copy.path()).await.unwrap();
    let error = controller(other.path()).await.map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
    assert!(error.advice.unwrap().contains("authority.key"));
}
